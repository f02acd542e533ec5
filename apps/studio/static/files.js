// Refuses files that are too large before Gradio sees them, which would say so in English and in another place than
// everything else. Runs in the head, so that it hears of a file first.
(() => {
  const most = Number(document.currentScript.dataset.most);  // bytes
  document.addEventListener("change", (event) => {
    const input = event.target;
    const large = input.matches?.("input[type=file]") && [...input.files].find((file) => file.size > most);
    if (!large) return;
    event.stopImmediatePropagation();
    input.value = "";  // else choosing the same file again would be no change
    const field = document.querySelector("#refused textarea, #refused input");
    field.value = JSON.stringify({ file: large.name, value: large.size, at: Date.now() });  // always a change
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }, true);
})();
