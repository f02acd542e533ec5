// The gallery: a grid of which only what is seen is in the document, a viewer, and what is done with what is selected.
// Everything that comes from files or people is put in as text, never as markup.
(() => {
  const GAP_ROWS = 2, BATCH = 120, TEXT = 26;
  let app = null, words = {}, numbers = [], rows = new Map(), asked = new Set(), cells = new Map();
  let selected = new Set(), at = 0, anchor = 0, opened = false, wait = 0, boards = [];

  const say = (key, values = {}) => (words[key] ?? key).replace(/{(\w+)}/g, (_, name) => values[name] ?? "");
  const make = (name, given = {}, ...children) => {
    const element = Object.assign(document.createElement(name), given);
    element.append(...children);
    return element;
  };
  const get = async (path) => {
    const answer = await fetch(`/gallery/${path}`, { headers: { accept: "application/json" } });
    if (!answer.ok) throw new Error(String(answer.status));
    return answer.json();
  };
  const post = async (path, body) => {
    const answer = await fetch(`/gallery/${path}`, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
    });
    const told = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(told.error?.message ?? String(answer.status));
    return told;
  };
  const note = (text, undo = null) => {
    app.note.replaceChildren(text);
    if (undo) app.note.append(make("button", { type: "button", textContent: say("undo"), onclick: undo }));
  };
  const failed = (error) => note(say("failed", { why: error.message }));
  const counted = () => numbers.length === 1 ? say("count.one") : say("count", { count: numbers.length });

  // ------------------------------------------------------------------ layout

  const build = (root) => {
    words = JSON.parse(root.dataset.words);
    const field = (given) => make("input", given);
    const choice = (label) => make("select", { ariaLabel: say(label) });
    const button = (key, act) => make("button", { type: "button", textContent: say(key), onclick: act });
    app = {
      root,
      text: field({ type: "search", placeholder: say("search"), ariaLabel: say("search") }),
      model: choice("model"), kind: choice("kind"), board: choice("board"),
      since: field({ type: "date", ariaLabel: say("since") }), until: field({ type: "date", ariaLabel: say("until") }),
      favourites: field({ type: "checkbox" }),
      note: make("p", { className: "gallery-note" }),
      scroll: make("div", { className: "gallery-scroll" }),
      list: make("div", { className: "gallery-rows" }),
      buttons: {
        select_all: button("select_all", () => { selected = new Set(selected.size ? [] : numbers); draw(); told(); }),
        favourite: button("favourite", () => mark()),
        delete: button("delete", () => remove()),
        zip: button("zip", () => zip()),
        compare: button("compare", () => compare()),
        slide: button("slide", () => slide()),
        to_board: button("to_board", () => toBoard()),
      },
    };
    app.note.setAttribute("role", "status");
    app.list.setAttribute("role", "listbox");
    app.list.ariaMultiSelectable = "true";
    app.list.ariaLabel = say("label");
    fill(app.kind, ["image", "clip", "sheet"].map((kind) => [kind, say(`kind.${kind}`)]));
    const dates = [["since", app.since], ["until", app.until]];
    root.append(
      make("div", { className: "gallery-bar" }, app.text, app.model, app.kind, app.board,
        ...dates.map(([key, one]) => make("label", {}, say(key), one)),
        make("label", {}, app.favourites, say("favourites"))),
      make("div", { className: "gallery-bar" }, ...Object.values(app.buttons)),
      app.note, app.scroll);
    app.scroll.append(app.list);
    for (const one of [app.model, app.kind, app.board, app.since, app.until, app.favourites]) one.onchange = load;
    app.text.oninput = () => { clearTimeout(wait); wait = setTimeout(load, 250); };
    app.scroll.onscroll = () => requestAnimationFrame(draw);
    app.list.onkeydown = keys;
    new ResizeObserver(() => draw()).observe(app.scroll);
  };

  const load = async () => {
    const asks = new URLSearchParams();
    const day = (value, more) => new Date(`${value}T00:00`).getTime() / 1000 + more;
    if (app.text.value.trim()) asks.set("text", app.text.value.trim());
    for (const name of ["model", "kind", "board"]) if (app[name].value) asks.set(name, app[name].value);
    if (app.since.value) asks.set("since", day(app.since.value, 0));
    if (app.until.value) asks.set("until", day(app.until.value, 86400));
    if (app.favourites.checked) asks.set("favourites", "true");
    try {
      const found = await get(`items?${asks}`);
      numbers = found.numbers;
      boards = found.boards;
      fill(app.model, found.models.map((name) => [name, name]));
      fill(app.board, boards.map((one) => [one.number, `${one.name} (${one.count})`]));
    } catch (error) { return failed(error); }
    rows.clear(); asked.clear();
    selected = new Set(numbers.filter((number) => selected.has(number)));
    at = anchor = 0;
    const isFiltered = [...asks].length > 0;
    note(numbers.length ? counted() : say(isFiltered ? "none" : "nothing"));
    app.scroll.hidden = !numbers.length;
    app.scroll.scrollTop = 0;
    draw();
  };

  const fill = (select, options) => {
    const value = select.value;
    select.replaceChildren(new Option(`${select.ariaLabel}: ${say("all")}`, ""), ...options.map(([key, text]) => new Option(text, key)));
    select.value = options.some(([key]) => String(key) === value) ? value : "";
  };

  // ------------------------------------------------------------------ the grid

  const shape = () => {
    const width = app.scroll.clientWidth || 1, wanted = parseFloat(getComputedStyle(app.root).getPropertyValue("--cell")) || 148;
    const columns = Math.max(2, Math.floor(width / wanted)), side = width / columns;
    return { columns, side, height: side + TEXT };
  };

  const draw = () => {
    if (!app || app.scroll.hidden) return buttons();
    const { columns, side, height } = shape();
    app.list.style.height = `${Math.ceil(numbers.length / columns) * height}px`;
    const first = Math.max(0, Math.floor(app.scroll.scrollTop / height) - GAP_ROWS) * columns;
    const last = (Math.ceil((app.scroll.scrollTop + app.scroll.clientHeight) / height) + GAP_ROWS) * columns;
    const seen = new Set(numbers.slice(first, last)), focused = numbers[at];
    if (focused !== undefined) seen.add(focused);
    for (const [number, cell] of cells) if (!seen.has(number)) { cell.remove(); cells.delete(number); }
    for (const number of seen) {
      const place = number === focused ? at : numbers.indexOf(number, first);
      const cell = cells.get(number) ?? add(number);
      Object.assign(cell.style, {
        width: `${side}px`, height: `${height}px`,
        insetInlineStart: `${(place % columns) * side}px`, top: `${Math.floor(place / columns) * height}px`,
      });
      cell.dataset.place = place;
      cell.tabIndex = place === at ? 0 : -1;
      cell.ariaPosInSet = place + 1;
      cell.ariaSetSize = numbers.length;
      cell.ariaSelected = String(selected.has(number));
    }
    fetchRows([...seen].filter((number) => !asked.has(number)));
    buttons();
  };

  const add = (number) => {
    const cell = make("div", { className: "gallery-cell" });
    cell.setAttribute("role", "option");
    cell.append(make("img", { src: `/gallery/thumbnail/${number}`, alt: "", loading: "lazy", decoding: "async" }), make("span", { className: "text" }));
    cell.onclick = (event) => pointed(number, event);
    cell.ondblclick = () => view(number);
    cells.set(number, cell);
    app.list.append(cell);
    caption(number);
    return cell;
  };

  const fetchRows = async (wanted) => {
    for (const number of wanted) asked.add(number);
    for (let i = 0; i < wanted.length; i += BATCH) {
      try {
        for (const row of await get(`rows?numbers=${wanted.slice(i, i + BATCH).join(",")}`)) {
          rows.set(row.number, row);
          caption(row.number);
        }
      } catch (error) { failed(error); }
    }
  };

  const caption = (number) => {
    const row = rows.get(number), cell = cells.get(number);
    if (!cell) return;
    const marks = row ? [row.kind === "clip" && say("clip"), row.kind === "sheet" && say("grid"), row.favourite && say("is_favourite")] : [];
    cell.ariaLabel = row ? [row.text, row.seed !== null && say("seed", { value: row.seed }), ...marks].filter(Boolean).join(", ") : String(number);
    cell.querySelector(".text").textContent = row?.text ?? "";
    for (const mark of cell.querySelectorAll(".mark")) mark.remove();
    if (row?.kind === "clip") cell.append(make("span", { className: "mark clip", ariaHidden: "true", textContent: "\u25b6" }));
    if (row?.favourite) cell.append(make("span", { className: "mark star", ariaHidden: "true", textContent: "\u2605" }));
  };

  const buttons = () => {
    const count = selected.size, { select_all, ...others } = app.buttons;
    select_all.textContent = say(count ? "deselect" : "select_all");
    for (const one of Object.values(others)) one.disabled = count === 0;
    app.buttons.compare.disabled = count < 2 || count > 4;
    app.buttons.slide.disabled = count !== 2;
  };

  const move = (place) => {
    at = Math.max(0, Math.min(numbers.length - 1, place));
    const { columns, height } = shape(), top = Math.floor(at / columns) * height, scroll = app.scroll;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    if (top + height > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + height - scroll.clientHeight;
    draw();
    cells.get(numbers[at])?.focus({ preventScroll: true });
  };

  const pointed = (number, event) => {
    const place = numbers.indexOf(number);
    if (event.shiftKey) for (let i = Math.min(anchor, place); i <= Math.max(anchor, place); i++) selected.add(numbers[i]);
    else {
      if (!(event.ctrlKey || event.metaKey)) { if (selected.size > 1 || !selected.has(number)) selected.clear(); }
      selected.has(number) ? selected.delete(number) : selected.add(number);
      anchor = place;
    }
    move(place);
    told();
  };

  const told = () => note(selected.size ? say("selected", { count: selected.size }) : counted());

  const keys = (event) => {
    const { columns } = shape(), way = getComputedStyle(app.list).direction === "rtl" ? -1 : 1;
    const steps = { ArrowRight: way, ArrowLeft: -way, ArrowDown: columns, ArrowUp: -columns, PageDown: 4 * columns, PageUp: -4 * columns };
    const acts = {
      Home: () => move(0), End: () => move(numbers.length - 1), Enter: () => view(numbers[at]),
      " ": () => { const number = numbers[at]; selected.has(number) ? selected.delete(number) : selected.add(number); draw(); told(); },
      f: () => mark(), F: () => mark(), Delete: () => remove(),
    };
    if (event.ctrlKey && event.key === "a") { selected = new Set(numbers); draw(); told(); } else if (event.ctrlKey || event.altKey || event.metaKey) return;
    else if (event.key in steps) move(at + steps[event.key]);
    else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
  };

  const chosen = () => selected.size ? numbers.filter((number) => selected.has(number)) : numbers[at] === undefined ? [] : [numbers[at]];

  // ------------------------------------------------------------------ changes

  const mark = async () => {
    const those = chosen(), favourite = !those.every((number) => rows.get(number)?.favourite);
    try {
      for (const number of (await post("mark", { numbers: those, favourite })).numbers) {
        if (rows.has(number)) rows.get(number).favourite = favourite;
        caption(number);
      }
    } catch (error) { failed(error); }
  };

  const remove = async () => {
    const those = chosen(), place = at;
    if (!those.length) return;
    try {
      const gone = await post("delete", { numbers: those });
      const lost = new Set(gone.numbers);
      numbers = numbers.filter((number) => !lost.has(number));
      selected.clear();
      app.scroll.hidden = !numbers.length;
      if (numbers.length) move(Math.min(place, numbers.length - 1)); else draw();
      note(say("deleted", { count: gone.numbers.length }), async () => {
        try {
          const back = await post("restore", { batch: gone.batch });
          await load();
          note(say("restored", { count: back.numbers.length }));
        } catch (error) { failed(error); }
      });
    } catch (error) { failed(error); }
  };

  const zip = () => {
    const form = make("form", { method: "post", action: "/gallery/zip", hidden: true });
    form.append(make("input", { name: "numbers", value: chosen().join(",") }));
    document.body.append(form);
    form.submit();
    form.remove();
  };

  const toBoard = async () => {
    const known = Number(app.board.value) || null;
    const name = known ? "" : prompt(say("board_name"));
    if (!known && !name?.trim()) return;
    const same = boards.find((one) => one.name === name?.trim());
    try {
      const told = await post("board", { numbers: chosen(), board: known ?? same?.number ?? null, name: name ?? "", is_on: !known });
      await load();
      note(say(known ? "removed" : "added", { count: told.numbers.length, name: name || app.board.selectedOptions[0]?.text }));
    } catch (error) { failed(error); }
  };

  // ------------------------------------------------------------------ the viewer

  const dialog = (title) => {
    const box = make("dialog", { className: "gallery-view" }), head = make("header", {}, make("h2", { textContent: title }));
    box.setAttribute("aria-label", say("viewer"));
    const close = make("button", { type: "button", textContent: say("close"), onclick: () => box.close() });
    box.append(head);
    head.append(close);
    box.onclose = () => { box.remove(); cells.get(numbers[at])?.focus({ preventScroll: true }); };
    document.body.append(box);
    box.showModal();
    return { box, head, add: (...those) => close.before(...those) };
  };
  const button = (key, act) => make("button", { type: "button", textContent: say(key), onclick: act });

  const view = (number) => {
    if (number === undefined) return;
    const shown = dialog(""), frame = make("div", { className: "gallery-frame" }), sheet = make("div", { className: "gallery-sheet" });
    let scale = 0, x = 0, y = 0, image = null;
    const place = () => { if (image && scale) image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`; };
    const zoom = (factor, event = null) => {
      if (!image || image.tagName !== "IMG") return;
      const box = frame.getBoundingClientRect();
      if (!scale) {
        scale = image.getBoundingClientRect().width / image.naturalWidth;
        x = (box.width - image.naturalWidth * scale) / 2; y = (box.height - image.naturalHeight * scale) / 2;
      }
      const cx = event ? event.clientX - box.left : box.width / 2, cy = event ? event.clientY - box.top : box.height / 2;
      const next = Math.max(0.05, Math.min(32, scale * factor));
      x = cx - (cx - x) * next / scale; y = cy - (cy - y) * next / scale; scale = next;
      frame.classList.add("free");
      place();
    };
    const fit = () => { scale = 0; frame.classList.remove("free"); if (image) image.style.transform = ""; };
    const full = () => { fit(); zoom(1); zoom(1 / scale); };
    const show = async (one) => {
      number = one; at = numbers.indexOf(one);
      fit();
      let row = rows.get(one);
      if (!row) { await fetchRows([one]); row = rows.get(one); }
      shown.box.querySelector("h2").textContent = row?.text ?? "";
      const source = `/gallery/file/${one}`;
      image = row?.kind === "clip"
        ? make("video", { src: `${source}?clip=true`, controls: true, loop: true, autoplay: true, muted: true })
        : make("img", { src: source, alt: row?.text ?? "", draggable: false });
      frame.replaceChildren(image);
      sheet.replaceChildren();
      try { sheet.append(table([await get(`settings/${one}`)])); } catch { sheet.append(say("gone")); }
    };
    const step = (by) => { const next = numbers[numbers.indexOf(number) + by]; if (next !== undefined) show(next); };
    const pick = (what) => { shown.box.close(); tell(number, what); };
    shown.add(button("previous", () => step(-1)), button("next", () => step(1)), button("fit", fit), button("full", full),
      button("zoom_in", () => zoom(1.5)), button("zoom_out", () => zoom(1 / 1.5)), button("use", () => pick("use")),
      button("reuse_settings", () => pick("reuse_settings")), button("start_from", () => pick("start_from")));
    shown.box.append(frame, sheet);
    frame.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event); }, { passive: false });
    frame.onpointerdown = (event) => {
      if (!scale) return;
      frame.setPointerCapture(event.pointerId);
      frame.onpointermove = (moved) => { x += moved.movementX; y += moved.movementY; place(); };
    };
    frame.onpointerup = () => { frame.onpointermove = null; };
    shown.box.onkeydown = (event) => {
      const acts = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), "+": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: fit, 1: full };
      if (!(event.key in acts) || event.target.closest("video")) return;
      event.preventDefault();
      acts[event.key]();
    };
    show(number);
  };

  const table = (all) => {
    const names = [...new Set(all.flatMap((one) => Object.keys(one)))].filter((name) => !["versions", "fingerprint"].includes(name));
    const text = (value) => value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    const body = make("tbody");
    for (const name of names) {
      const values = all.map((one) => text(one[name]));
      const row = make("tr", {}, make("th", { scope: "row", textContent: name }), ...values.map((value) => make("td", { textContent: value })));
      if (new Set(values).size > 1) { row.className = "differs"; row.title = say("differs"); }
      body.append(row);
    }
    return make("table", {}, body);
  };

  const compare = async () => {
    const those = chosen().slice(0, 4);
    try {
      const all = await Promise.all(those.map((number) => get(`settings/${number}`)));
      const shown = dialog(say("compare")), sheet = make("div", { className: "gallery-sheet all" }, table(all));
      shown.box.append(sheet);
    } catch (error) { failed(error); }
  };

  const slide = () => {
    const [after, before] = chosen(), shown = dialog(say("before_after"));
    const top = make("img", { src: `/gallery/file/${after}`, alt: say("after") });
    const pair = make("div", { className: "gallery-pair" }, make("img", { src: `/gallery/file/${before}`, alt: say("before") }), top);
    const range = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: say("slider") });
    range.oninput = () => { top.style.clipPath = `inset(0 0 0 ${range.value}%)`; };
    range.oninput();
    shown.box.append(make("div", { className: "gallery-frame" }, pair), range);
  };

  // What was chosen goes to the page by a hidden field, and what comes next is a click on the button for it.
  const tell = (number, what) => {
    const box = document.querySelector("#gallery-pick textarea, #gallery-pick input");
    box.value = `${number} ${what} ${Date.now()}`;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const NEXT = { reuse_settings: "#reuse-settings", start_from: "#start-from" };

  window.tesseraGallery = {
    open() {
      const root = document.querySelector(".gallery-app");
      if (!root) return;
      if (!app || app.root !== root) { cells.clear(); build(root); }
      load();
    },
    next(told) { const found = NEXT[String(told).split(" ")[1]]; if (found) document.querySelector(`${found}:not([disabled])`)?.click(); },
  };
})();
