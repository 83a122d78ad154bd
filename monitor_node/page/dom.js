// Small pieces of page. Whatever a run says goes in as textContent, so it is never markup.

export const byId = (id) => document.getElementById(id);

export function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

export function button(text, onClick) {
  const made = element("button", text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

// A table row of [text, class, tooltip].
export function row(cells) {
  const made = element("tr");
  for (const [text, className, tooltip] of cells) {
    const cell = element("td", text, className || "");
    if (tooltip) cell.title = tooltip;
    made.append(cell);
  }
  return made;
}

export function fillTable(id, rows, nothing = "none yet") {
  const body = byId(id);
  const empty = row([[nothing, "soft"]]);
  empty.firstChild.colSpan = body.parentElement.querySelectorAll("th").length;
  body.replaceChildren(...(rows.length ? rows : [empty]));
}

export function fillList(id, items, nothing = "none") {
  byId(id).replaceChildren(...(items.length ? items : [element("li", nothing, "soft")]));
}

export function tile(name, value, detail = "", className = "") {
  const made = element("dl", "", "tile");
  made.append(element("dt", name), element("dd", value, className));
  made.lastChild.append(element("small", detail));
  return made;
}

// A bar of shares and its legend, e.g. where the time went. Parts: [name, share 0..1, words, colour index].
export function stackedBar(barId, legendId, parts) {
  const pieces = parts.filter(([, share]) => share > 0).map(([name, share, words, place]) => {
    const made = element("i");
    made.style.width = 100 * share + "%";
    made.style.background = `var(--c${place % 10})`;
    made.title = `${name}: ${words}`;
    return made;
  });
  byId(barId).replaceChildren(...pieces);
  byId(legendId).replaceChildren(...parts.map(([name, , words, place]) => legendItem(name, words, `var(--c${place % 10})`)));
}

export function legendItem(name, words, colour) {
  const item = element("li");
  const box = element("i", "", "box");
  box.style.background = colour;
  item.append(box, element("span", name + " "), element("b", words));
  return item;
}
