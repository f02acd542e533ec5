// The tab Server: a button Stop tells its job by a hidden field; it keeps the focus when the table is drawn anew.
(() => {
  let held = "";
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.server-stop");
    const box = document.querySelector("#server-stop textarea, #server-stop input");
    if (!button || !box) return;
    button.disabled = true;
    box.value = `${button.dataset.job} ${Date.now()}`;
    box.dispatchEvent(new Event("input", { bubbles: true }));
  });
  document.addEventListener("focusin", (event) => { held = event.target.closest?.("button.server-stop")?.dataset.job ?? ""; });
  new MutationObserver(() => {
    if (!held || document.activeElement !== document.body) return;
    document.querySelector(`#server-queue button[data-job="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
