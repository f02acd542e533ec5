// The gallery: a grid of which only what is seen is in the document, a viewer, and what is done with what is selected.
// Everything that comes from files or people is put in as text, never as markup.
(() => {
  const BASE = "/gallery", SPARE_ROWS = 2, BATCH = 120, TEXT = 26, IDLE = 90, LONGEST = 500, MOST_COMPARED = 4;
  let app = null, words = {}, numbers = [], rows = new Map(), asked = new Set(), cells = new Map();
  let selected = new Set(), at = 0, anchor = 0, typing = 0, idle = 0, since = 0, facets = { boards: [] }, loads = 0;

  const say = (key, values = {}) => (words[key] ?? key).replace(/{(\w+)}/g, (_, name) => values[name] ?? "");
  const make = (name, given = {}, ...children) => {
    const element = Object.assign(document.createElement(name), given);
    element.append(...children);
    return element;
  };
  const button = (key, act, more = {}) => make("button", { type: "button", textContent: say(key), onclick: act, ...more });
  const call = async (path, method = "GET", body = undefined) => {
    const json = body === undefined ? {} : { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(`${BASE}/${path}`, { method, ...json });
    const told = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(told.error?.message ?? String(answer.status));
    return told;
  };
  const note = (text, undo = null) => app.note.replaceChildren(text, ...(undo ? [button("undo", undo)] : []));
  const failed = (error) => note(say("failed", { why: error.message }));
  const guarded = (act) => async (...given) => { try { return await act(...given); } catch (error) { failed(error); } };
  const counted = () => numbers.length === 1 ? say("count.one") : say("count", { count: numbers.length });
  const told = () => note(selected.size ? say("selected", { count: selected.size }) : counted());
  const chosen = () => selected.size ? numbers.filter((number) => selected.has(number)) : numbers.slice(at, at + 1);
  const file = (number, part = "file") => `${BASE}/images/${number}/${part}`;

  // ------------------------------------------------------------------ layout

  const build = (root) => {
    words = JSON.parse(root.dataset.words);
    const choice = (label) => make("select", { ariaLabel: say(label) });
    const field = (type, label) => make("input", { type, ariaLabel: say(label) });
    app = {
      root,
      text: Object.assign(field("search", "search"), { placeholder: say("search"), maxLength: 500 }),
      model: choice("model"), kind: choice("kind"), board: choice("board"),
      since: field("date", "since"), until: field("date", "until"), favourites: make("input", { type: "checkbox" }),
      note: make("p", { className: "gallery-note" }),
      scroll: make("div", { className: "gallery-scroll" }),
      list: make("div", { className: "gallery-rows", ariaLabel: say("label"), ariaMultiSelectable: "true", title: say("keys") }),
      ones: {
        select_all: button("select_all", () => { selected = new Set(selected.size ? [] : numbers); draw(); told(); }),
        favourite: button("favourite", () => mark()), delete: button("delete", () => remove()),
        zip: button("zip", () => zip()), compare: button("compare", () => compare()), slide: button("slide", () => slide()),
        to_board: button("to_board", () => toBoard()), off_board: button("off_board", () => offBoard()),
      },
      all: {
        rename_board: button("rename_board", () => renameBoard()), delete_board: button("delete_board", () => deleteBoard()),
        trash: button("trash", () => emptyTrash()), reset: button("reset", () => reset()),
      },
    };
    app.note.setAttribute("role", "status");
    app.list.setAttribute("role", "listbox");
    fill(app.kind, ["image", "clip", "sheet"].map((kind) => [kind, say(`kind.${kind}`)]));
    const filters = make("div", { className: "gallery-bar" }, app.text, app.model, app.kind, app.board,
      make("label", {}, say("since"), app.since), make("label", {}, say("until"), app.until),
      make("label", {}, app.favourites, say("favourites")), ...Object.values(app.all));
    filters.setAttribute("role", "search");
    filters.ariaLabel = say("filters");
    root.replaceChildren(filters, make("div", { className: "gallery-bar" }, ...Object.values(app.ones)), app.note, app.scroll);
    app.scroll.append(app.list);
    for (const one of [app.model, app.kind, app.board, app.since, app.until, app.favourites]) one.onchange = load;
    app.text.oninput = () => { clearTimeout(typing); typing = setTimeout(load, 250); };
    let isDue = false;
    app.scroll.onscroll = () => {
      if (!isDue) requestAnimationFrame(() => { isDue = false; draw(true); });
      isDue = true;
    };
    app.list.onkeydown = keys;
    measure();
    new ResizeObserver(() => requestAnimationFrame(() => { measure(); draw(); })).observe(app.scroll);
  };

  const fill = (select, options) => {
    const value = select.value;
    select.replaceChildren(new Option(`${select.ariaLabel}: ${say("all")}`, ""), ...options.map(([key, text]) => new Option(text, key)));
    select.value = options.some(([key]) => String(key) === value) ? value : "";
  };

  const reset = () => {
    for (const one of [app.text, app.model, app.kind, app.board, app.since, app.until]) one.value = "";
    app.favourites.checked = false;
    load();
  };

  const filters = () => {
    const asks = new URLSearchParams(), set = (name, value) => { if (value) asks.set(name, value); };
    const day = (value, days) => {
      const found = new Date(`${value}T00:00`);
      found.setDate(found.getDate() + days);  // a day need not have 24 hours
      return Math.max(found.getTime() / 1000, 0);
    };
    set("q", app.text.value.trim());
    for (const name of ["model", "kind", "board"]) set(name, app[name].value);
    if (app.since.value) set("since", day(app.since.value, 0));
    if (app.until.value) set("until", day(app.until.value, 1));
    set("favourites", app.favourites.checked && "true");
    return asks;
  };

  const load = guarded(async () => {
    const asks = filters(), turn = ++loads;
    const [found, offered] = await Promise.all([call(`images/index?${asks}`), call("images/facets")]);
    if (turn !== loads) return;  // another search has begun meanwhile
    numbers = found.ids;
    facets = offered;
    fill(app.model, facets.models.map((name) => [name, name]));
    fill(app.board, facets.boards.map((one) => [one.id, `${one.name} (${one.count})`]));
    rows.clear();
    asked.clear();
    for (const cell of cells.values()) cell.remove();
    cells.clear();
    selected = new Set(numbers.filter((number) => selected.has(number)));
    at = anchor = 0;
    note(numbers.length ? counted() : say([...asks].length ? "none" : "nothing"));
    app.scroll.hidden = !numbers.length;
    app.list.style.height = "100vh";
    app.scroll.scrollTop = 0;
    measure();
    draw();
  });

  // ------------------------------------------------------------------ the grid

  // Measured when the size changes and not while somebody scrolls, for which the whole page would be laid out each time.
  const measure = () => {
    const width = app.scroll.clientWidth || 1, wanted = parseFloat(getComputedStyle(app.root).getPropertyValue("--cell")) || 148;
    const columns = Math.max(2, Math.floor(width / wanted)), side = width / columns;
    app.shape = { columns, side, height: side + TEXT, shown: app.scroll.clientHeight };
  };

  const draw = (isScrolling = false) => {
    if (!isScrolling) enable();
    app.scroll.hidden = !numbers.length;
    if (!numbers.length) return;
    const { columns, side, height, shown } = app.shape, top = app.scroll.scrollTop;
    app.list.style.height = `${Math.ceil(numbers.length / columns) * height}px`;
    const first = Math.max(0, Math.floor(top / height) - SPARE_ROWS) * columns;
    const last = (Math.ceil((top + shown) / height) + SPARE_ROWS) * columns;
    const places = new Map(numbers.slice(first, last).map((number, i) => [number, first + i]));
    places.set(numbers[at], at);  // what has the focus stays in the document
    for (const [number, cell] of cells) if (!places.has(number)) { cell.remove(); cells.delete(number); }
    for (const [number, place] of places) {
      const cell = cells.get(number) ?? add(number);
      cell.style.cssText = `width:${side}px;height:${height}px;left:${(place % columns) * side}px;top:${Math.floor(place / columns) * height}px`;
      cell.tabIndex = place === at ? 0 : -1;
      cell.ariaPosInSet = place + 1;
      cell.ariaSetSize = numbers.length;
      cell.ariaSelected = String(selected.has(number));
    }
    settle();
  };

  // While somebody scrolls fast nothing is fetched for what is gone before it is there.
  const settle = () => {
    clearTimeout(idle);
    since ||= performance.now();
    idle = setTimeout(() => { since = 0; show(); }, performance.now() - since > LONGEST ? 0 : IDLE);
  };

  const show = () => {
    for (const [number, cell] of cells) {
      const image = cell.querySelector("img");
      if (!image.hasAttribute("src")) image.src = file(number, "thumbnail");
    }
    fetchRows([...cells.keys()].filter((number) => !asked.has(number)));
  };

  const fetchRows = guarded(async (wanted) => {
    for (const number of wanted) asked.add(number);
    for (let i = 0; i < wanted.length; i += BATCH) {
      for (const row of (await call(`images?ids=${wanted.slice(i, i + BATCH).join(",")}`)).images) {
        rows.set(row.id, row);
        caption(row.id);
      }
    }
  });

  const add = (number) => {
    const image = make("img", { alt: "", decoding: "async", draggable: false });
    image.onload = () => cell.classList.toggle("wide", image.naturalWidth >= 2 * image.naturalHeight);
    image.onerror = () => cell.classList.add("gone");
    const tick = make("span", { className: "tick", ariaHidden: "true" });
    const cell = make("div", { className: "gallery-cell" }, image, make("span", { className: "text" }), tick);
    cell.setAttribute("role", "option");
    cell.onclick = (event) => pointed(number, event, event.target === tick);
    cell.ondblclick = (event) => { if (event.target !== tick) view(number); };
    cells.set(number, cell);
    app.list.append(cell);
    caption(number);
    return cell;
  };

  const named = (row) => [
    row.prompt, row.seed !== null && say("seed", { value: row.seed }), row.kind === "clip" && say("clip"),
    row.kind === "sheet" && say("grid"), row.favourite && say("is_favourite"),
  ].filter(Boolean).join(", ");

  const caption = (number) => {
    const row = rows.get(number), cell = cells.get(number);
    if (!cell) return;
    cell.ariaLabel = row ? named(row) : say("loading");
    cell.querySelector(".text").textContent = row?.prompt ?? "";
    for (const mark of cell.querySelectorAll(".mark")) mark.remove();
    const mark = (kind, sign) => cell.append(make("span", { className: `mark ${kind}`, ariaHidden: "true", textContent: sign }));
    if (row?.kind === "clip") mark("clip", "\u25b6");
    if (row?.kind === "sheet") mark("clip", "\u25a6");
    if (row?.favourite) mark("star", "\u2605");
  };

  const enable = () => {
    const count = selected.size, board = app.board.value !== "";
    app.ones.select_all.textContent = say(count ? "deselect" : "select_all");
    for (const [key, one] of Object.entries(app.ones)) if (key !== "select_all") one.disabled = !count;
    app.ones.compare.disabled = count < 2 || count > MOST_COMPARED;
    app.ones.compare.title = say("compare.count");
    app.ones.slide.disabled = count !== 2;
    app.ones.off_board.hidden = app.all.rename_board.hidden = app.all.delete_board.hidden = !board || !facets.may_change;
    for (const key of ["favourite", "delete", "to_board"]) app.ones[key].hidden = !facets.may_change;
    app.all.trash.hidden = !facets.deleted || !facets.may_change;
    app.all.trash.textContent = say("trash", { count: facets.deleted });
    app.all.reset.hidden = ![...filters()].length;
  };

  const move = (place, isRange = false) => {
    at = Math.max(0, Math.min(numbers.length - 1, place));
    if (isRange) range(anchor, at);
    const { columns, height } = app.shape, top = Math.floor(at / columns) * height, scroll = app.scroll;
    if (top < scroll.scrollTop) scroll.scrollTop = top;
    if (top + height > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + height - scroll.clientHeight;
    draw();
    cells.get(numbers[at])?.focus({ preventScroll: true });
  };

  const range = (one, other) => { selected = new Set(numbers.slice(Math.min(one, other), Math.max(one, other) + 1)); };
  const toggle = (number) => { if (!selected.delete(number)) selected.add(number); };

  const pointed = (number, event, isTick) => {
    const place = numbers.indexOf(number);
    if (event.shiftKey) range(anchor, place);
    else {
      if (isTick || event.ctrlKey || event.metaKey) toggle(number);
      else selected = new Set(selected.size === 1 && selected.has(number) && event.detail < 2 ? [] : [number]);
      anchor = place;
    }
    move(place);
    told();
  };

  const keys = (event) => {
    const { columns } = app.shape, step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns,
      PageDown: 4 * columns, PageUp: -4 * columns, Home: -at, End: numbers.length - 1 - at }[event.key];
    const acts = {
      Enter: () => view(numbers[at]), " ": () => { toggle(numbers[at]); anchor = at; draw(); told(); },
      f: () => mark(), F: () => mark(), Delete: () => remove(), Escape: () => { selected.clear(); draw(); told(); },
    };
    if ((event.ctrlKey || event.metaKey) && event.key === "a") { selected = new Set(numbers); draw(); told(); }
    else if (event.ctrlKey || event.altKey || event.metaKey) return;
    else if (step !== undefined) { move(at + step, event.shiftKey); if (event.shiftKey) told(); else anchor = at; }
    else if (event.key in acts) acts[event.key]();
    else return;
    event.preventDefault();
  };

  // ------------------------------------------------------------------ changes

  const mark = guarded(async (those = chosen()) => {
    if (!facets.may_change) return;
    const favourite = !those.every((number) => rows.get(number)?.favourite);
    for (const number of (await call("images/favourite", "POST", { ids: those, favourite })).ids) {
      if (rows.has(number)) rows.get(number).favourite = favourite;
      caption(number);
    }
  });

  const remove = guarded(async () => {
    const those = chosen();
    if (!those.length || !facets.may_change) return;
    const gone = await call("images/delete", "POST", { ids: those }), lost = new Set(gone.ids);
    const place = numbers.slice(0, at).filter((number) => !lost.has(number)).length;
    numbers = numbers.filter((number) => !lost.has(number));
    facets.deleted += lost.size;
    selected.clear();
    anchor = at = Math.max(0, Math.min(place, numbers.length - 1));
    if (numbers.length) move(at); else draw();
    note(say("deleted", { count: lost.size }), guarded(async () => {
      const back = await call("images/restore", "POST", { batch: gone.batch });
      await load();
      note(say("restored", { count: back.ids.length }));
    }));
  });

  const zip = () => {
    const those = chosen(), most = facets.most_archived;
    if (those.length > most) return note(say("zip.most", { most, count: those.length }));
    const link = make("a", { href: `${BASE}/images/archive?ids=${those.join(",")}`, download: "" });
    document.body.append(link);
    link.click();
    link.remove();
  };

  const board = () => facets.boards.find((one) => String(one.id) === app.board.value);

  const toBoard = guarded(async () => {
    const those = chosen(), name = await ask("to_board", "board_name", "", facets.boards.map((one) => one.name));
    if (!name) return;
    const known = facets.boards.find((one) => one.name === name) ?? await call("boards", "POST", { name });
    const put = await call(`boards/${known.id}/images`, "POST", { ids: those });
    await load();
    note(say("added", { count: put.ids.length, name: known.name }));
  });

  const offBoard = guarded(async () => {
    const one = board(), off = await call(`boards/${one.id}/images/remove`, "POST", { ids: chosen() });
    await load();
    note(say("removed", { count: off.ids.length, name: one.name }));
  });

  const renameBoard = guarded(async () => {
    const one = board(), name = await ask("rename_board", "board_name", one.name);
    if (!name) return;
    await call(`boards/${one.id}`, "PATCH", { name });
    await load();
  });

  const deleteBoard = guarded(async () => {
    const one = board();
    if (!await ask("delete_board", null, say("delete_board.sure", { name: one.name }))) return;
    await call(`boards/${one.id}`, "DELETE");
    app.board.value = "";
    await load();
  });

  const emptyTrash = guarded(async () => {
    if (!await ask("trash", null, say("trash.sure", { count: facets.deleted }), [], { count: facets.deleted })) return;
    const gone = await call("trash", "DELETE");
    await load();
    note(say("trash.done", { count: gone.count }));
  });

  // ------------------------------------------------------------------ dialogs

  const dialog = (title, more = "") => {
    const box = make("dialog", { className: `gallery-view ${more}`, ariaLabel: title || say("viewer") });
    const head = make("header", {}, make("h2", { textContent: title })), close = button("close", () => box.close());
    head.append(close);
    box.append(head);
    box.onclose = () => { box.remove(); cells.get(numbers[at])?.focus({ preventScroll: true }); };
    document.body.append(box);
    box.showModal();
    return { box, add: (...those) => close.before(...those) };
  };

  // Ask for a name (with names to choose from), or whether something is meant. Nothing if it was given up.
  const ask = (title, label, text, offered = [], values = {}) => new Promise((resolve) => {
    const { box } = dialog(say(title, values), "ask"), form = make("form", { method: "dialog" });
    const field = make("input", { type: "text", value: text, maxLength: 80, required: true, ariaLabel: label ? say(label) : "" });
    const list = make("datalist", { id: "gallery-offered" }, ...offered.map((one) => new Option(one)));
    if (label) field.setAttribute("list", list.id);
    form.append(label ? field : make("p", { textContent: text }), list, make("button", { textContent: say("ok"), value: "ok" }));
    box.append(form);
    box.addEventListener("close", () => resolve(box.returnValue === "ok" ? (label ? field.value.trim() : true) : null));
    if (label) field.focus();
  });

  // ------------------------------------------------------------------ the viewer

  const pair = (before, after) => {
    const top = make("img", { src: after, alt: say("after"), draggable: false });
    const both = make("div", { className: "gallery-pair" }, make("img", { src: before, alt: say("before"), draggable: false }), top);
    const slider = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: say("slider") });
    slider.oninput = () => { top.style.clipPath = `inset(0 0 0 ${slider.value}%)`; };
    slider.oninput();
    return [both, slider];
  };

  const view = (number) => {
    if (number === undefined) return;
    const shown = dialog(""), frame = make("div", { className: "gallery-frame" }), sheet = make("div", { className: "gallery-sheet" });
    const slot = make("div", { className: "gallery-slot" });
    let scale = 0, x = 0, y = 0, image = null, turn = 0;
    const place = () => { image.style.transform = `translate(${x}px, ${y}px) scale(${scale})`; };
    const zoom = (factor, event = null) => {
      if (image?.tagName !== "IMG" || !image.naturalWidth) return;
      const box = frame.getBoundingClientRect();
      if (!scale) {
        scale = image.getBoundingClientRect().width / image.naturalWidth;
        x = (box.width - image.naturalWidth * scale) / 2;
        y = (box.height - image.naturalHeight * scale) / 2;
      }
      const cx = event ? event.clientX - box.left : box.width / 2, cy = event ? event.clientY - box.top : box.height / 2;
      const next = Math.max(0.05, Math.min(32, scale * factor));
      x = cx - (cx - x) * next / scale;
      y = cy - (cy - y) * next / scale;
      scale = next;
      frame.classList.add("free");
      place();
    };
    const fit = () => { scale = 0; frame.classList.remove("free"); if (image) image.style.transform = ""; };
    const full = () => { fit(); zoom(1); if (scale) zoom(1 / scale); };
    const show = async (one) => {
      number = one;
      at = numbers.indexOf(one);
      fit();
      slot.replaceChildren();
      if (!rows.has(one)) await fetchRows([one]);
      if (number !== one) return;
      const row = rows.get(one), mine = ++turn;
      shown.box.querySelector("h2").textContent = row?.prompt ?? "";
      image = row?.clip
        ? make("video", { src: row.clip, controls: true, loop: true, autoplay: true, muted: true })
        : make("img", { src: file(one), alt: row ? named(row) : "", draggable: false });
      frame.replaceChildren(image);
      buttons.before_after.disabled = !row?.source;
      buttons.start_from.disabled = row?.kind !== "image";
      buttons.save.href = row?.clip ?? file(one);
      buttons.save.download = (row?.name ?? "").replace(/\.\w+$/, row?.clip ? ".mp4" : "$&");
      sheet.replaceChildren();
      const all = await call(`images/${one}`).catch(() => null);
      if (mine === turn) sheet.replaceChildren(all ? table([all.settings]) : say("gone"));
    };
    const compareSource = () => {
      const [both, slider] = pair(rows.get(number).source, file(number));
      both.firstChild.onerror = () => slot.replaceChildren(say("gone"));
      fit();
      image = both;
      frame.replaceChildren(both);
      slot.replaceChildren(slider);
    };
    const step = (by) => { const next = numbers[numbers.indexOf(number) + by]; if (next !== undefined) show(next); };
    const pick = (what) => { shown.box.close(); tell(number, what); };
    const buttons = {
      previous: button("previous", () => step(-1)), next: button("next", () => step(1)), fit: button("fit", fit),
      full: button("full", full), zoom_in: button("zoom_in", () => zoom(1.5)), zoom_out: button("zoom_out", () => zoom(1 / 1.5)),
      before_after: button("before_after", compareSource), save: make("a", { textContent: say("save") }),
      use: button("use", () => pick("use")), reuse_settings: button("reuse_settings", () => pick("reuse_settings")),
      start_from: button("start_from", () => pick("start_from")),
    };
    shown.add(...Object.values(buttons));
    shown.box.append(frame, slot, sheet);
    frame.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event); }, { passive: false });
    frame.onpointerdown = (event) => {
      if (!scale) return;
      frame.setPointerCapture(event.pointerId);
      frame.onpointermove = (moved) => { x += moved.movementX; y += moved.movementY; place(); };
    };
    frame.onpointerup = frame.onpointercancel = () => { frame.onpointermove = null; };
    shown.box.onkeydown = (event) => {
      const acts = {
        ArrowRight: () => step(1), ArrowLeft: () => step(-1), "+": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: fit, 1: full,
        f: () => mark([number]),
      };
      if (!(event.key in acts) || event.ctrlKey || event.metaKey || event.target.closest("video, input")) return;
      event.preventDefault();
      acts[event.key]();
    };
    show(number);
  };

  const table = (all) => {
    const first = ["prompt", "negative_prompt", "model", "seed", "steps", "guidance", "width", "height"];
    const held = new Set(all.flatMap((one) => Object.keys(one)));
    const names = [...first.filter((name) => held.has(name)), ...[...held].filter((name) => !first.includes(name))];
    const text = (value) => value === undefined || value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    const body = make("tbody");
    for (const name of names) {
      const values = all.map((one) => text(one[name])), differs = new Set(values).size > 1;
      if (!differs && ["", "[]", "{}", "false"].includes(values[0])) continue;  // what nobody has set
      const row = make("tr", { className: differs ? "differs" : "" }, make("th", { scope: "row", textContent: words[`label.${name}`] ?? name, title: name }));
      if (differs) row.firstChild.append(make("em", { textContent: ` (${say("differs")})` }));
      row.append(...values.map((value) => make("td", { textContent: value })));
      body.append(row);
    }
    return make("table", {}, body);
  };

  const compare = guarded(async () => {
    const those = chosen().slice(0, MOST_COMPARED);
    const all = await Promise.all(those.map((number) => call(`images/${number}`)));
    const shown = dialog(say("compare")), found = table(all.map((one) => one.settings)), head = make("tr", {}, make("th", { textContent: say("setting") }));
    for (const one of all) head.append(make("th", { scope: "col" }, make("img", { src: one.thumbnail, alt: named(one) })));
    found.prepend(make("thead", {}, head));
    shown.box.append(make("div", { className: "gallery-sheet all" }, found));
  });

  const slide = () => {
    const [after, before] = chosen(), shown = dialog(say("before_after")), [both, slider] = pair(file(before), file(after));
    shown.box.append(make("div", { className: "gallery-frame" }, both), make("div", { className: "gallery-slot" }, slider));
    slider.focus();
  };

  // What was chosen goes to the page by a hidden field, and what comes next is a click on the button for it.
  const tell = (number, what) => {
    const box = document.querySelector("#gallery-pick textarea, #gallery-pick input");
    box.value = `${number} ${what} ${Date.now()}`;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const NEXT = { reuse_settings: "#reuse-settings", start_from: "#start-from" };

  // An image that is dropped onto the settings is read as one that was chosen there.
  const dropped = (event) => event.target.closest?.("#settings, #prompt-panel") && event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => { if (dropped(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    const input = document.querySelector("#settings-file input[type=file], #settings input[type=file]");
    if (!dropped(event) || !input || event.dataTransfer.files.length !== 1) return;
    event.preventDefault();
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });

  window.tesseraGallery = {
    open() {
      const root = document.querySelector(".gallery-app");
      if (!root) return;
      if (app?.root !== root) { cells.clear(); build(root); }
      load();
    },
    next(told) {
      const found = NEXT[String(told).split(" ")[1]], until = performance.now() + 5000;
      const press = () => {  // Gradio draws what a listener changed a moment after it has told so
        const one = document.querySelector(`${found}:not([disabled])`);
        if (one) one.click();
        else if (performance.now() < until) setTimeout(press, 50);
      };
      if (found) press();
    },
  };
})();
