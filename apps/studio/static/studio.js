// Runs once when the page has loaded. Everything listens on the document, because Gradio redraws its parts.
() => {
  const root = document.body;
  const promptBox = () => document.querySelector("#prompt textarea");

  // Which tab is open decides what the style sheet shows.
  window.tessera = {
    go(tab) {
      const desk = document.querySelector("#desk");
      if (desk) desk.dataset.tab = tab;
    },
  };
  window.tessera.go("text");
  document.documentElement.lang = location.pathname.startsWith("/zh") ? "zh" : "en";

  const dark = localStorage.getItem("tessera-dark");
  if (dark !== null) root.classList.toggle("dark", dark === "1");

  const addWord = (word) => {
    const box = promptBox();
    const text = box.value.trimEnd();
    box.value = text ? `${text} ${word}` : word;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    box.focus({ preventScroll: true });
  };

  document.addEventListener("click", (event) => {
    const word = event.target.closest(".word");
    if (word) addWord(word.textContent);
    if (event.target.closest(".night")) {
      localStorage.setItem("tessera-dark", root.classList.toggle("dark") ? "1" : "0");
    }
  });

  document.addEventListener("input", (event) => {
    if (!event.target.matches(".words input")) return;
    const wanted = event.target.value.trim().toLowerCase();
    const words = [...event.target.parentElement.querySelectorAll(".word")];
    for (const word of words) word.hidden = !word.textContent.toLowerCase().includes(wanted);
    event.target.parentElement.querySelector(".nothing").hidden = words.some((word) => !word.hidden);
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) document.querySelector("#paint").click();
    if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
  });
}
