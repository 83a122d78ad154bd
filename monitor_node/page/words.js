// Numbers as people read them. A value that is not known is a dash, never 0.

export const DASH = "–";
export const isKnown = (value) => value !== null && value !== undefined;
export const whole = (value) => (isKnown(value) ? Math.round(value).toLocaleString("en") : DASH);
export const percent = (share) => (isKnown(share) ? (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %" : DASH);

// A number, its marker ("NaN", "inf") when it is not finite, or a dash when it is not known.
export function number(owner, key, digits = 4) {
  if (isKnown(owner[key])) return owner[key].toFixed(digits);
  return owner[key + "_marker"] || DASH;
}
// The same where NaN says "not measured" (Outcome).
export const measured = (owner, key, digits = 4) =>
  owner[key + "_marker"] === "NaN" ? DASH : number(owner, key, digits);
export function bytes(value) {
  if (!isKnown(value)) return DASH;
  if (value >= 2 ** 30) return (value / 2 ** 30).toFixed(2) + " GiB";
  return value > 0 && value < 2 ** 20 ? Math.ceil(value / 2 ** 10) + " KiB" : (value / 2 ** 20).toFixed(0) + " MiB";
}
export function duration(seconds) {
  if (!isKnown(seconds)) return DASH;
  if (seconds < 60) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
  const inMinutes = seconds < 3600;
  const small = Math.floor(inMinutes ? seconds : seconds / 60);
  return Math.floor(small / 60) + ":" + String(small % 60).padStart(2, "0") + (inMinutes ? " min" : " h");
}
export const clock = (unixSeconds) =>
  unixSeconds > 0 ? new Date(1000 * unixSeconds).toLocaleTimeString("en", { hourCycle: "h23" }) : "";
// Three digits that matter, e.g. steps a second; small rates keep their size.
export const rate = (value) => (isKnown(value) ? Number(value.toPrecision(3)).toLocaleString("en") : DASH);
// A difference always says its sign, with a minus as wide as the plus.
export const signed = (value, digits = 4) =>
  isKnown(value) ? (value > 0 ? "+" : "−") + Math.abs(value).toFixed(digits) : DASH;
// What a proposal's forecast and its outcome say together; null unless both are known. Below 0: better than forecast.
export const difference = (outcome, forecast) => (isKnown(outcome) && isKnown(forecast) ? outcome - forecast : null);
