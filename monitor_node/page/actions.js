// The buttons that act on the run: only there when the monitor was started with a token.
// The token is asked for once and kept for this tab (sessionStorage); it goes nowhere but into the header.
import { byId } from "./dom.js";
import { state } from "./feed.js";

const KEPT_AS = "monitor-token";
const MOST_LETTERS = 200; // of a refusal, which a proxy may have written
const NAMES = { checkpoint: "checkpoint", pause: "pause of prediction", resume: "prediction again", stop: "stop" };

export function drawActions() {
  const actions = state.actions;
  byId("actions").hidden = !actions?.enabled;
  if (!actions?.enabled) return;
  const isOver = state.run?.status === "finished";
  byId("act-pause").dataset.action = actions.paused ? "resume" : "pause";
  byId("act-pause").textContent = actions.paused ? "Resume prediction" : "Pause prediction";
  for (const made of byId("actions").querySelectorAll("button")) made.disabled = isOver;
}

function say(text, isBad = false) {
  byId("action-words").textContent = text;
  byId("action-words").className = isBad ? "bad" : "soft";
}

function askToken() {
  const dialog = byId("token-dialog");
  byId("token").value = "";
  dialog.returnValue = ""; // a dialog keeps its last answer, and Escape gives none
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? byId("token").value.trim() : ""), { once: true }));
}

export async function act(action) {
  const token = sessionStorage.getItem(KEPT_AS) || (await askToken());
  if (!token) return say("nothing was asked");
  try {
    const answer = await fetch("/api/actions/" + action, {
      method: "POST", body: "{}", headers: { Authorization: "Bearer " + token, "Content-Type": "application/json" },
    });
    if (answer.status === 401) sessionStorage.removeItem(KEPT_AS);
    if (answer.status === 401) return say("wrong token: nothing was asked", true);
    if (!answer.ok) return say(`refused (${answer.status}): ${(await answer.text()).slice(0, MOST_LETTERS)}`, true);
    sessionStorage.setItem(KEPT_AS, token);
    say(`asked for: ${NAMES[action]}`);
  } catch {
    say("the monitor is not reachable: nothing was asked", true);
  }
}

export function listenForActions() {
  byId("actions").addEventListener("click", (event) => {
    const action = event.target.dataset.action;
    if (action === "stop") byId("stop-dialog").showModal();
    else if (action) act(action);
  });
  byId("stop-dialog").querySelector("[value=ok]").addEventListener("click", () => act("stop"));
  for (const made of document.querySelectorAll("dialog button"))
    made.addEventListener("click", () => made.closest("dialog").close(made.value));
  byId("token").addEventListener("keydown", (event) => event.key === "Enter" && byId("token-dialog").close("ok"));
}
