// The tools around the prompt: help beside every control, earlier prompts, generating for ever, a sound or a
// notification when something is done. What the server says stands in hidden elements of the page; text is put in as
// text, never as markup.
(() => {
  const find = (query, within = document) => within.querySelector(query);
  const tools = () => find("#prompt-tools .tools");
  const tool = (name) => find(`#prompt-tools [data-tool="${name}"]`);
  const texts = () => JSON.parse(tools()?.dataset.texts || "{}");
  const field = () => find("#prompt textarea, #prompt input");
  const note = (text) => { const place = find("#prompt-tools .tool-note"); if (place) place.textContent = text; };
  const recall = (name) => { try { return localStorage.getItem(`tessera-${name}`) === "on"; } catch { return false; } };
  const keep = (name, on) => { try { localStorage.setItem(`tessera-${name}`, on ? "on" : "off"); } catch { /* private */ } };

  // ------------------------------------------------------------------------ help
  let bubble, shown;
  const hide = () => { if (bubble) bubble.hidden = true; shown = null; };
  const show = (tip) => {
    const text = document.getElementById(tip.getAttribute("aria-describedby"));
    if (!text) return;
    if (!bubble) {
      bubble = document.createElement("div");
      bubble.className = "help-bubble";
      bubble.setAttribute("role", "tooltip");
      document.body.append(bubble);
    }
    bubble.textContent = text.textContent;
    bubble.hidden = false;
    shown = tip;
    const at = tip.getBoundingClientRect(), size = bubble.getBoundingClientRect();
    const below = at.bottom + 6 + size.height <= innerHeight;
    bubble.style.left = `${Math.max(8, Math.min(at.left - 12, innerWidth - size.width - 12))}px`;
    bubble.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)}px`;
  };
  const describe = () => {
    const label = texts().help || "{label}";
    for (const text of document.querySelectorAll(".help-texts [data-for]")) {
      const block = document.getElementById(text.dataset.for);
      if (!block) continue;
      for (const input of block.querySelectorAll("input, textarea, select"))
        if (!input.hasAttribute("aria-describedby")) input.setAttribute("aria-describedby", text.id);
      if (block.querySelector(".help-tip")) continue;
      const name = block.querySelector('[data-testid="block-info"], legend, label > span, .label-text');
      if (!name) continue;
      const tip = document.createElement("button");
      tip.type = "button";
      tip.className = "help-tip";
      tip.textContent = "?";
      tip.setAttribute("aria-label", label.replace("{label}", name.textContent.trim()));
      tip.setAttribute("aria-describedby", text.id);
      name.append(tip);
    }
  };
  const tipOf = (event) => event.target.closest?.(".help-tip");
  document.addEventListener("mouseover", (event) => { const tip = tipOf(event); if (tip) show(tip); });
  document.addEventListener("mouseout", (event) => { if (tipOf(event) && document.activeElement !== shown) hide(); });
  document.addEventListener("focusin", (event) => { const tip = tipOf(event); if (tip) show(tip); else hide(); });
  document.addEventListener("focusout", (event) => { if (tipOf(event)) hide(); });
  document.addEventListener("scroll", hide, true);
  document.addEventListener("click", (event) => {
    const tip = tipOf(event);
    if (!tip) return;
    event.preventDefault(); // the label around it would set its control
    event.stopPropagation();
    tip.focus();
    show(tip);
  }, true);

  // ------------------------------------------------------------- earlier prompts
  let place = -1, draft = "";
  const earlier = () => {
    try { return JSON.parse(find("#earlier textarea, #earlier input")?.value || "[]"); } catch { return []; }
  };
  const put = (text, atEnd) => {
    const box = field();
    const set = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), "value").set;
    set.call(box, text);
    box.dispatchEvent(new Event("input", { bubbles: true }));
    const at = atEnd ? text.length : 0;
    box.setSelectionRange(at, at);
  };
  const step = (event, by) => {
    const box = field(), prompts = earlier();
    const alone = box.selectionStart === box.selectionEnd;
    const atEdge = by > 0 ? box.selectionStart === 0 : box.selectionStart === box.value.length;
    if (!alone || !atEdge || event.shiftKey || event.altKey || event.ctrlKey || event.metaKey) return;
    const next = place + by;
    if (next < -1 || next >= prompts.length) return;
    if (place === -1) draft = box.value;
    event.preventDefault();
    place = next;
    put(place === -1 ? draft : prompts[place], by < 0);
  };
  const menu = () => find("#prompt-tools .history");
  const close = (back) => {
    if (!menu() || menu().hidden) return;
    menu().hidden = true;
    tool("history").setAttribute("aria-expanded", "false");
    if (back) tool("history").focus();
  };
  const list = () => {
    const wanted = find("input", menu()).value.trim().toLowerCase();
    const found = earlier().filter((one) => one.toLowerCase().includes(wanted));
    const rows = found.map((one) => {
      const row = document.createElement("li");
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", "false");
      row.tabIndex = -1;
      row.textContent = one;
      return row;
    });
    if (!rows.length) {
      const row = document.createElement("li");
      row.setAttribute("role", "option");
      row.setAttribute("aria-disabled", "true");
      row.setAttribute("aria-selected", "false");
      row.textContent = texts().none;
      rows.push(row);
    }
    find("#history-list").replaceChildren(...rows);
  };
  const open = () => {
    menu().hidden = false;
    tool("history").setAttribute("aria-expanded", "true");
    find("input", menu()).value = "";
    list();
    find("input", menu()).focus();
  };
  const take = (row) => {
    if (row.hasAttribute("aria-disabled")) return;
    close(false);
    place = -1;
    field().focus();
    put(row.textContent, true);
  };
  document.addEventListener("input", (event) => {
    if (event.target.closest?.("#prompt-tools .history")) list();
    else if (event.target === field() && event.isTrusted) place = -1;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { hide(); close(true); }
    if (event.target === field() && !event.isComposing) {
      if (event.key === "ArrowUp") step(event, 1);
      if (event.key === "ArrowDown") step(event, -1);
      return;
    }
    if (!event.target.closest?.("#prompt-tools .history")) return;
    const rows = [...document.querySelectorAll("#history-list li")];
    const at = rows.indexOf(event.target);
    const go = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (event.key === "Enter") { event.preventDefault(); if (rows[Math.max(at, 0)]) take(rows[Math.max(at, 0)]); }
    else if (go !== undefined && (at >= 0 || event.key === "ArrowDown")) {
      event.preventDefault();
      if (go < 0) find("input", menu()).focus(); else rows[Math.min(go, rows.length - 1)]?.focus();
    }
  });

  // ------------------------------------------- for ever, and what is said when done
  let old = ""; // what was wrong before it was switched on, until something runs
  let forever = false, wasBusy = false, idleSince = 0, asked = 0, sounds;
  const busy = () => { const stop = find("#stop"); return Boolean(stop) && !stop.disabled; };
  const wrong = () => find("#problem .problem")?.textContent || "";
  const press = (name, on) => tool(name)?.setAttribute("aria-pressed", String(on));
  const setForever = (on) => { forever = on; asked = 0; old = wrong(); press("forever", on); };
  const random = () => {
    const choice = find('#seed-mode input[value="random"]') || find("#seed-mode input");
    if (choice && !choice.checked) choice.click();
  };
  const tone = () => {
    sounds ??= new AudioContext();
    sounds.resume();
    for (const [i, pitch] of [660, 880].entries()) {
      const source = sounds.createOscillator(), volume = sounds.createGain(), at = sounds.currentTime + i * 0.14;
      source.frequency.value = pitch;
      volume.gain.setValueAtTime(0.0001, at);
      volume.gain.exponentialRampToValueAtTime(0.15, at + 0.02);
      volume.gain.exponentialRampToValueAtTime(0.0001, at + 0.22);
      source.connect(volume).connect(sounds.destination);
      source.start(at);
      source.stop(at + 0.24);
    }
  };
  const tellDone = () => {
    if (recall("sound")) tone();
    if (recall("notify") && document.hidden && globalThis.Notification?.permission === "granted")
      new Notification(texts().title, { body: texts().done, tag: "tessera-done" });
  };
  const again = () => {
    const now = performance.now(), is = busy();
    if (is) { idleSince = 0; asked = 0; old = ""; } else if (!idleSince) idleSince = now;
    if (wasBusy && !is && !wrong()) tellDone();
    wasBusy = is;
    if (!forever) return;
    if (wrong() && wrong() !== old) { setForever(false); return; }
    // The last job has ended, and the page has had a moment to say so; what was asked for a moment ago may be on its way.
    if (!is && now - idleSince > 300 && (!asked || now - asked > 15000)) {
      asked = now;
      random();
      setTimeout(() => { if (forever) find("#generate")?.click(); }, 60);
    }
  };
  document.addEventListener("click", async (event) => {
    if (event.isTrusted && event.target.closest?.("#stop")) setForever(false);
    const row = event.target.closest?.("#history-list li");
    if (row) { take(row); return; }
    const button = event.target.closest?.("#prompt-tools .tool");
    if (!button) { if (!event.target.closest?.("#prompt-tools .history")) close(false); return; }
    const name = button.dataset.tool;
    note("");
    if (name === "history") { if (menu().hidden) open(); else close(true); }
    else if (name === "forever") { setForever(!forever); again(); }
    else if (name === "sound") { keep(name, !recall(name)); press(name, recall(name)); if (recall(name)) tone(); }
    else if (name === "notify") {
      let on = !recall(name);
      if (on && (await globalThis.Notification?.requestPermission()) !== "granted") { on = false; note(texts().denied); }
      keep(name, on);
      press(name, on);
    }
  });
  addEventListener("pagehide", () => setForever(false));

  let waiting = false;
  const look = () => {
    waiting = false;
    describe();
    for (const name of ["sound", "notify"]) if (tool(name)) press(name, recall(name));
    press("forever", forever);
  };
  const start = () => {
    const watch = new MutationObserver(() => {
      if (waiting) return;
      waiting = true;
      setTimeout(look, 150);
    });
    watch.observe(document.body, { childList: true, subtree: true });
    // A quick job is over before anybody looks at a clock: the button that stops it tells of every change.
    new MutationObserver((changes) => {
      if (!changes.some((one) => one.target.id === "stop")) return;
      wasBusy ||= !busy();
      asked = 0;
      idleSince = 0;
      again();
    }).observe(document.body, { attributes: true, attributeFilter: ["disabled"], subtree: true });
    setInterval(again, 250);
    look();
  };
  if (document.body) start(); else addEventListener("DOMContentLoaded", start);
})();
