// Arrow keys, Home and End move through the tabs, as people who use the keyboard alone expect of a list of tabs.
document.addEventListener("keydown", (event) => {
  const tab = event.target.closest?.("[role=tab]"), list = tab?.closest("[role=tablist]");
  if (!list || event.altKey || event.ctrlKey || event.metaKey) return;
  const tabs = [...list.querySelectorAll("[role=tab]:not([disabled])")].filter((one) => one.offsetParent !== null);
  const way = getComputedStyle(list).direction === "rtl" ? -1 : 1, at = tabs.indexOf(tab);
  const places = { ArrowRight: at + way, ArrowLeft: at - way, Home: 0, End: tabs.length - 1 };
  if (!(event.key in places)) return;
  event.preventDefault();
  const next = tabs[(places[event.key] + tabs.length) % tabs.length];
  next.click();
  next.focus();
});
