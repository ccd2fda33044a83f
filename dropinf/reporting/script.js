"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const dialog = document.getElementById("dialog");
  const root = document.documentElement;

  // Text of the data only ever becomes text nodes and attributes that hold no code.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const bdi = (text, attributes = {}) => make("bdi", { dir: "auto", ...attributes }, text);
  const number = (value, digits = 4) => {
    if (value === null || value === undefined) return "not known";
    const size = Math.abs(value);
    const shown = size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
    return shown.replace("-", "\u2212");
  };
  const count = (value) => value.toLocaleString("en-US");
  const oneLine = (content) => {
    if (!content) return "";
    if (content.text !== undefined) return content.text.slice(0, 300);
    if (content.values) return content.values.map(([name, value]) => `${name} ${value}`).join(", ");
    return "";
  };

  // What an example holds: text (folded if long, shaded by its tokens' shares), an image, values.
  const FOLD = 600;
  const shaded = (tokens, room) => {
    const most = Math.max(...tokens.map(([, share]) => Math.abs(share)), 1e-30);
    const parts = [];
    for (const [token, share] of tokens) {
      if (room <= 0) break;
      room -= token.length;
      const mark = make("mark", { title: `${token.trim()}: ${number(share, 3)}` }, token);
      const way = share < 0 ? "--harm-back" : "--help-back";
      mark.style.background = `rgba(var(${way}), ${(0.6 * Math.abs(share)) / most})`;
      parts.push(mark);
    }
    return parts;
  };
  const contentOf = (content, tokens = null) => {
    const box = make("div", { class: "content" });
    if (!content && !tokens) return box;
    if (content && content.image) box.append(make("img", { class: "picture", src: content.image, alt: content.text || "image" }));
    if (content && content.values) {
      const list = make("dl", { class: "values" });
      for (const [name, value] of content.values) list.append(make("dt", {}, bdi(name)), make("dd", {}, bdi(String(value))));
      box.append(list);
    }
    const text = tokens ? tokens.map(([token]) => token).join("") : content && content.text;
    if (text !== undefined && text !== null) {
      const body = make("div", { class: "text", dir: "auto" });
      const fill = (room) => (tokens ? body.replaceChildren(...shaded(tokens, room)) : (body.textContent = text.slice(0, room)));
      fill(FOLD);
      box.append(body);
      const left = text.length - FOLD;
      if (left > 0) {
        const more = make("button", { class: "more", type: "button", "aria-expanded": "false" }, `Show ${count(left)} characters more`);
        more.addEventListener("click", () => {
          const open = more.getAttribute("aria-expanded") === "true";
          fill(open ? FOLD : Infinity);
          more.setAttribute("aria-expanded", String(!open));
          more.textContent = open ? `Show ${count(left)} characters more` : "Show less";
        });
        box.append(more);
      }
      if (content && content.cut) box.append(make("p", { class: "soft" }, `The text is longer; this file holds ${count(text.length)} characters of it.`));
    }
    return box;
  };

  // A list of which only what is in sight is in the page: rows of one height, drawn as it scrolls.
  const rowList = ({ height, label, draw, open, move }) => {
    const inner = make("div");
    const box = make("div", { class: "rows", tabindex: "0", role: "listbox", "aria-label": label }, inner);
    let items = [], active = 0;
    const render = () => {
      const first = Math.max(0, Math.floor(box.scrollTop / height) - 4);
      const last = Math.min(items.length, Math.ceil((box.scrollTop + (box.clientHeight || 800)) / height) + 4);
      inner.style.height = `${items.length * height}px`;
      const rows = [];
      for (let at = first; at < last; at++) {
        const row = make("div", { class: "row", role: "option", id: `${label}-${at}`.replace(/\W/g, "-"), "aria-selected": String(at === active), "aria-setsize": items.length, "aria-posinset": at + 1 });
        row.style.top = `${at * height}px`;
        row.style.height = `${height}px`;
        row.append(...draw(items[at], at));
        row.addEventListener("click", () => { go(at); open(items[at]); });
        rows.push(row);
      }
      inner.replaceChildren(...rows);
      if (items.length) box.setAttribute("aria-activedescendant", `${label}-${active}`.replace(/\W/g, "-"));
      else { box.removeAttribute("aria-activedescendant"); inner.append(make("p", { class: "soft" }, "\u00a0 Nothing matches.")); }
    };
    const go = (at) => {
      if (!items.length) return;
      active = Math.max(0, Math.min(items.length - 1, at));
      if (active * height < box.scrollTop) box.scrollTop = active * height;
      if ((active + 1) * height > box.scrollTop + box.clientHeight) box.scrollTop = (active + 1) * height - box.clientHeight;
      render();
      if (move) move(items[active]);
    };
    const page = () => Math.max(1, Math.floor(box.clientHeight / height) - 1);
    const keys = { ArrowDown: () => go(active + 1), ArrowUp: () => go(active - 1), j: () => go(active + 1), k: () => go(active - 1), PageDown: () => go(active + page()), PageUp: () => go(active - page()), Home: () => go(0), End: () => go(items.length - 1), Enter: () => items.length && open(items[active]) };
    box.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
      event.preventDefault();
      keys[event.key]();
    });
    let due = false;
    box.addEventListener("scroll", () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => { due = false; render(); });
    });
    return { box, show: (found) => { items = found; active = 0; box.scrollTop = 0; render(); }, render, go, at: () => items[active] };
  };

  const searchBox = (label, run) => {
    const input = make("input", { type: "search", placeholder: label, "aria-label": label, class: "search" });
    input.addEventListener("input", () => run(input.value.trim().toLowerCase()));
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      input.value = "";
      run("");
      input.blur();
    });
    return input;
  };

  // A score with its error bar, on an axis that the examples of a query share.
  const scoreBar = (score, error, most, harm) => {
    const w = 150, middle = w / 2, x = (value) => middle + (value / most) * (middle - 4);
    const clamp = (value) => Math.max(1, Math.min(w - 1, value));
    const drawing = svg("svg", { viewBox: `0 0 ${w} 14`, width: w, height: 14, "aria-hidden": "true" });
    drawing.style.width = "7rem";
    const group = svg("g", harm ? { class: "second" } : {});
    group.append(svg("rect", { class: "bar", x: Math.min(middle, x(score)), y: 3, width: Math.max(1, Math.abs(x(score) - middle)), height: 8 }));
    drawing.append(svg("line", { class: "axis", x1: middle, x2: middle, y1: 0, y2: 14 }), group);
    if (error !== null && error !== undefined) drawing.append(svg("line", { class: "error", x1: clamp(x(score - error)), x2: clamp(x(score + error)), y1: 7, y2: 7 }));
    return drawing;
  };
  const exampleCard = (found, most) => {
    const { id, score, error } = found;
    const shown = number(score) + (error === null || error === undefined ? "" : ` \u00b1 ${number(error, 2)}`);
    return make("article", { class: "card example" },
      make("div", { class: "head" }, bdi(String(id), { class: "id" }), make("span", { class: "number" }, shown), scoreBar(score, error, most, score < 0)),
      contentOf(data.contents[found.content], found.tokens));
  };

  const querySection = () => {
    const section = make("section", { id: "queries" });
    const detail = make("div", { id: "detail", "aria-live": "polite" });
    const show = (query) => {
      const all = [...query.top, ...query.bottom];
      const most = Math.max(...all.map(({ score, error }) => Math.abs(score) + (error || 0)), 1e-30);
      const side = (title, kind, list) => make("div", {}, make("h3", { class: kind }, title), ...list.map((found) => exampleCard(found, most)));
      detail.replaceChildren(
        make("div", { class: "card query" }, make("h2", { id: "open-query" }, "Query ", bdi(String(query.id))), contentOf(query.content)),
        all.length
          ? make("div", { class: "sides" }, side("Helpful: they lower its loss", "help", query.top), side("Harmful: they raise it, or lower it least", "harm", query.bottom))
          : make("p", {}, "This query is invalid: its loss or gradient was not finite."));
    };
    const list = rowList({ height: 40, label: "Queries", draw: (query) => [bdi(String(query.id), { class: "id" }), bdi(oneLine(query.content), { class: "text" })], open: show, move: show });
    const search = searchBox("Search queries", (word) => {
      list.show(data.queries.filter((query) => !word || `${query.id} ${oneLine(query.content)}`.toLowerCase().includes(word)));
      if (list.at()) show(list.at());
    });
    section.append(make("div", { class: "queries" },
      make("div", { class: "list" }, search, list.box, make("p", { class: "soft keys" }, make("kbd", {}, "j"), " ", make("kbd", {}, "k"), " next and previous, ", make("kbd", {}, "/"), " search")),
      detail));
    return { name: "Queries", section, shown: () => list.render(), start: () => { list.show(data.queries); if (data.queries.length) show(data.queries[0]); }, step: (by) => list.box.dispatchEvent(new KeyboardEvent("keydown", { key: by > 0 ? "j" : "k" })) };
  };

  const suspiciousSection = () => {
    const found = data.suspicious;
    const section = make("section", { id: "suspicious" });
    const n = found.ids.length, all = Array.from({ length: n }, (_, i) => i);
    const text = (i) => oneLine(data.contents[found.contents[i]]);
    const words = all.map((i) => `${found.ids[i]} ${text(i)}`.toLowerCase());
    const place = new Map([...all].sort((a, b) => found.own[b] - found.own[a]).map((i, at) => [i, at + 1]));
    let by = "own", down = true, word = "";
    const values = { own: found.own, mean: found.mean, id: found.ids };
    const order = () => {
      const by_value = values[by];
      const kept = all.filter((i) => !word || words[i].includes(word));
      const less = (a, b) => (by_value[a] === by_value[b] ? a - b : (by_value[a] === null ? -Infinity : by_value[a]) < (by_value[b] === null ? -Infinity : by_value[b]) ? -1 : 1);
      kept.sort((a, b) => (down ? less(b, a) : less(a, b)));
      list.show(kept);
      told.textContent = `${count(kept.length)} of ${count(n)} training examples`;
      for (const [name, button] of heads) {
        button.setAttribute("aria-sort", name === by ? (down ? "descending" : "ascending") : "none");
        button.textContent = button.dataset.label + (name === by ? (down ? " \u2193" : " \u2191") : "");
      }
    };
    const open = (i) => {
      const rows = [["self-influence", number(found.own[i])], ["its place", `${count(place.get(i))} of ${count(n)}`]];
      if (found.mean) rows.push(["mean score over queries", number(found.mean[i])]);
      if (found.truth) rows.push(["known to be wrong", found.truth[i] ? "yes" : "no"]);
      const table = make("table", { class: "facts" });
      for (const [what, how] of rows) table.append(make("tr", {}, make("th", { scope: "row" }, what), make("td", {}, how)));
      const close = make("button", { type: "button", on: { click: () => dialog.close() } }, "Close");
      dialog.replaceChildren(make("h2", { id: "dialog-title" }, "Training example ", bdi(String(found.ids[i]))), contentOf(data.contents[found.contents[i]]), table, make("p", {}, close));
      dialog.showModal();
    };
    const draw = (i) => {
      const content = data.contents[found.contents[i]];
      return [
        make("span", { class: "place number soft" }, count(place.get(i))),
        bdi(String(found.ids[i]), { class: "id" }),
        make("span", { class: "value number" }, number(found.own[i])),
        found.mean ? make("span", { class: "value number mean" }, number(found.mean[i])) : null,
        found.truth ? make("span", { class: found.truth[i] ? "truth wrong" : "truth soft" }, found.truth[i] ? "wrong" : "right") : null,
        content && content.image ? make("img", { class: "picture small", src: content.image, alt: "" }) : null,
        bdi(text(i), { class: "text" }),
      ].filter(Boolean);
    };
    const list = rowList({ height: 40, label: "Training examples", draw, open });
    const told = make("span", { class: "soft", role: "status" });
    const heads = new Map();
    const head = (name, label, kind) => {
      const button = make("button", { type: "button", class: kind, "data-label": label });
      button.addEventListener("click", () => { down = by === name ? !down : true; by = name; order(); });
      heads.set(name, button);
      return button;
    };
    section.append(
      make("p", {}, "Self-influence is large for what the model fits with few other examples: what is memorised, mislabelled or rare. Open an example with a click or Enter."),
      make("div", { class: "tools" }, searchBox("Search training examples", (found_word) => { word = found_word; order(); }), told),
      make("div", { class: "table" },
        make("div", { class: "head" }, make("span", { class: "place soft" }, "#"), head("id", "example", "id"), head("own", "self-influence", "value"),
          found.mean ? head("mean", "mean score", "value mean") : null,
          found.truth ? make("span", { class: "truth soft" }, "truth") : null),
        list.box));
    return { name: "Suspicious", section, start: order, shown: () => list.render() };
  };

  // Charts: x and y in the units of the data; titles are what a pointer or a reader of screens gets.
  const W = 420, H = 220, LEFT = 66, RIGHT = 12, TOP = 10, BOTTOM = 40;
  const frame = (x_label, y_label, title) => {
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
    drawing.append(svg("line", { class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM }));
    const label = (x, y, text, more = {}) => { const t = svg("text", { x, y, "text-anchor": "middle", ...more }); t.textContent = text; drawing.append(t); };
    label((LEFT + W - RIGHT) / 2, H - 6, x_label);
    label(10, (TOP + H - BOTTOM) / 2, y_label, { transform: `rotate(-90 10 ${(TOP + H - BOTTOM) / 2})` });
    return { drawing, label };
  };
  const titled = (element, text) => { const title = svg("title"); title.textContent = text; element.append(title); return element; };
  const chart = (title, drawing, note) => make("figure", { class: "card" }, make("h3", {}, title), drawing, note ? make("figcaption", {}, note) : null);
  const histogram = ({ title, label, edges, counts, note }) => {
    const most = Math.max(...counts, 1), { drawing, label: write } = frame(label, "examples", title);
    const x = (at) => LEFT + (at / counts.length) * (W - LEFT - RIGHT), y = (value) => H - BOTTOM - (Math.sqrt(value) / Math.sqrt(most)) * (H - BOTTOM - TOP);
    counts.forEach((value, at) => drawing.append(titled(svg("rect", { class: "bar", x: x(at) + 0.5, width: Math.max(0.5, x(at + 1) - x(at) - 1), y: y(value), height: H - BOTTOM - y(value) }), `${number(edges[at], 3)} to ${number(edges[at + 1], 3)}: ${count(value)}`)));
    [0, counts.length / 2, counts.length].forEach((at) => write(x(at), H - BOTTOM + 15, number(edges[at], 2), { "text-anchor": at === 0 ? "start" : at === counts.length ? "end" : "middle" }));
    [most, most / 4].forEach((value) => write(LEFT - 5, y(value) + 4, count(Math.round(value)), { "text-anchor": "end" }));
    return chart(title, drawing, note);
  };
  const lines = ({ title, label, y_label, x: at, series, note, chosen }) => {
    const finite = series.flatMap(({ y, error }) => y.flatMap((v, i) => (v === null ? [] : [v - (error[i] || 0), v + (error[i] || 0)])));
    const low = Math.min(0, ...finite), high = Math.max(1e-30, ...finite), { drawing, label: write } = frame(label, y_label, title);
    const lx = at.map(Math.log), wide = lx[lx.length - 1] - lx[0] || 1;
    const x = (i) => LEFT + 14 + ((lx[i] - lx[0]) / wide) * (W - LEFT - RIGHT - 28), y = (v) => H - BOTTOM - ((v - low) / (high - low)) * (H - BOTTOM - TOP);
    at.forEach((value, i) => write(x(i), H - BOTTOM + 15, number(value, 3), value === chosen ? { "font-weight": 700 } : {}));
    [low, (low + high) / 2, high].forEach((value) => write(LEFT - 5, y(value) + 4, number(value, 2), { "text-anchor": "end" }));
    series.forEach(({ name, y: ys, error }, number_of) => {
      const group = svg("g", number_of ? { class: "second" } : {});
      group.append(svg("polyline", { class: "line", points: ys.map((v, i) => (v === null ? "" : `${x(i)},${y(v)}`)).join(" ") }));
      ys.forEach((v, i) => {
        if (v === null) return;
        if (error[i]) group.append(svg("line", { class: "error", x1: x(i), x2: x(i), y1: y(v - error[i]), y2: y(v + error[i]) }));
        group.append(titled(svg(number_of ? "rect" : "circle", number_of ? { class: "bar", x: x(i) - 4, y: y(v) - 4, width: 8, height: 8 } : { class: "bar", cx: x(i), cy: y(v), r: 4.5 }), `${name} at ${number(at[i], 3)}: ${number(v, 3)}${error[i] ? ` \u00b1 ${number(error[i], 2)}` : ""}`));
      });
      drawing.append(group);
    });
    const key = series.length > 1 ? series.map(({ name }, i) => `${i ? "\u25a0" : "\u25cf"} ${name}`).join("   ") : null;
    return chart(title, drawing, [key, note].filter(Boolean).join(". "));
  };
  const bars = ({ title, names, values, note }) => {
    const most = Math.max(...values, 1e-30), high = 20, drawing = svg("svg", { viewBox: `0 0 ${W} ${names.length * high}`, role: "img", "aria-label": title });
    names.forEach((name, at) => {
      const text = svg("text", { x: 150, y: at * high + 14, "text-anchor": "end" });
      text.textContent = name.length > 24 ? `\u2026${name.slice(-23)}` : name;
      const width = (values[at] / most) * (W - 150 - 60), value = svg("text", { x: 160 + width, y: at * high + 14 });
      value.textContent = `${number(100 * values[at], 3)} %`;
      drawing.append(text, titled(svg("rect", { class: "bar", x: 155, y: at * high + 4, width: Math.max(1, width), height: high - 8 }), `${name}: ${number(100 * values[at], 3)} %`), value);
    });
    return chart(title, drawing, note);
  };
  const chartSection = () => {
    const kinds = { histogram, lines, bars };
    return { name: "Charts", section: make("section", { id: "charts" }, make("div", { class: "charts" }, ...data.charts.map((each) => kinds[each.kind](each)))) };
  };
  const factsSection = () => {
    const section = make("section", { id: "facts" });
    for (const { title, columns, rows, notes } of data.tables) {
      const table = make("table", { class: "facts" });
      if (columns) table.append(make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, bdi(name)))));
      for (const [first, ...others] of rows) table.append(make("tr", {}, make("th", { scope: "row" }, bdi(first)), ...others.map((cell) => make("td", {}, bdi(cell.replaceAll("+-", "\u00b1"))))));
      section.append(make("h2", {}, title), make("div", { class: "scroll" }, table), ...(notes || []).map((note) => make("p", { class: "soft" }, note)));
    }
    return { name: "How it was made", section };
  };

  const sections = [querySection(), data.suspicious && suspiciousSection(), data.charts.length && chartSection(), factsSection()].filter(Boolean);
  const tabs = document.getElementById("tabs");
  // No id of the page, which a browser would scroll to, past the tabs.
  const fragment = ({ section }) => `#tab-${section.id}`;
  const select = (at, focus) => {
    sections.forEach(({ section, shown }, i) => {
      section.hidden = i !== at;
      buttons[i].setAttribute("aria-selected", String(i === at));
      buttons[i].tabIndex = i === at ? 0 : -1;
      if (i === at && shown) shown();
    });
    if (focus) buttons[at].focus();
    history.replaceState(null, "", fragment(sections[at]));
  };
  const buttons = sections.map(({ name, section }, at) => {
    section.setAttribute("role", "tabpanel");
    section.setAttribute("aria-label", name);
    main.append(section);
    const button = make("button", { type: "button", role: "tab", "aria-controls": section.id, on: { click: () => select(at) } }, name);
    button.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) select((at + by + sections.length) % sections.length, true);
    });
    tabs.append(button);
    return button;
  });
  sections.forEach(({ start }) => start && start());
  select(Math.max(0, sections.findIndex((one) => fragment(one) === location.hash)));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, dialog, [role=listbox]")) return;
    const open = sections.find(({ section }) => !section.hidden);
    if (event.key === "/") { const input = open.section.querySelector(".search"); if (input) { event.preventDefault(); input.focus(); } }
    if ((event.key === "j" || event.key === "k") && open.step) open.step(event.key === "j" ? 1 : -1);
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => { root.dataset.theme = name; };
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));
})();
