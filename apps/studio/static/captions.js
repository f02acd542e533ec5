// The cards of the images to train on: their captions, and which of them were removed, go into a field of the page as
// JSON: name of the image -> caption, or null. The server draws the cards anew when images are added.
(() => {
  const tell = () => {
    const told = {};
    for (const card of document.querySelectorAll(".ft-card"))
      told[card.dataset.name] = card.hidden ? null : card.querySelector("textarea").value;
    const field = document.querySelector("#ft-captions textarea, #ft-captions input");
    field.value = JSON.stringify(told);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  document.addEventListener("input", (event) => {
    if (event.target.closest?.(".ft-card")) tell();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".ft-card button");
    if (!button) return;
    const card = button.closest(".ft-card");
    const next = card.nextElementSibling?.querySelector("textarea");
    card.hidden = true;
    const note = document.querySelector(".ft-count");
    const left = document.querySelectorAll(".ft-card:not([hidden])").length;
    if (note) note.textContent = note.dataset.text.replace("#", left);
    tell();
    next?.focus();
  });
})();
