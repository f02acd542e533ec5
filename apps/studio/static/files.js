// Refuses files that are too large before Gradio sees them, which would say so in English and in another place than
// everything else. Runs in the head, so that it hears of a file first.
(() => {
  const { most, together } = document.currentScript.dataset;  // bytes of a file, and of all that are chosen at once
  document.addEventListener("change", (event) => {
    const input = event.target;
    if (!input.matches?.("input[type=file]")) return;
    const files = [...input.files], large = files.find((file) => file.size > Number(most));
    const total = files.reduce((sum, file) => sum + file.size, 0);
    if (!large && total <= Number(together)) return;
    const told = large ? { file: large.name, value: large.size } : { count: files.length, value: total };
    event.stopImmediatePropagation();
    input.value = "";  // else choosing the same file again would be no change
    const field = document.querySelector("#refused textarea, #refused input");
    field.value = JSON.stringify({ ...told, at: Date.now() });  // always a change
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }, true);
})();
