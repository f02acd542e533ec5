// Runs in the head, before anything is drawn: the first visit goes to the language that the browser asks for, later
// ones to the language that was chosen last. Addresses of a language by name stay as they are.
(() => {
  const languages = document.currentScript.dataset.languages.split(" ");  // English, at /, first
  const KEY = "tessera-language";
  const here = location.pathname.split("/")[1];
  const asked = navigator.languages.map((name) => name.toLowerCase().split("-")[0]).find((name) => languages.includes(name));
  const wanted = localStorage.getItem(KEY) ?? asked;
  if (here === "" && languages.slice(1).includes(wanted)) location.replace(`/${wanted}/${location.search}`);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a.language");
    if (link) localStorage.setItem(KEY, new URL(link.href).pathname.split("/")[1] || languages[0]);
  });
})();
