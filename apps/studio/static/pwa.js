// The page as an app: the manifest in its language, the area under the notch, the colour of the bar above it, the worker.
(() => {
  const { languages, light, night } = document.currentScript.dataset;
  const here = location.pathname.split("/")[1];
  const language = languages.split(" ").includes(here) ? here : "";

  // Gradio's page names one manifest for all languages, before everything else in the head.
  const manifest = document.querySelector("link[rel=manifest]");
  if (manifest && language) manifest.setAttribute("href", `/${language}/manifest.json`);
  const viewport = document.querySelector("meta[name=viewport]");
  if (viewport && !viewport.content.includes("viewport-fit")) viewport.content += ", viewport-fit=cover";

  // Made here, because Gradio keeps one of a name only. The button for dark and light goes before what the system asks for.
  const colours = { light, dark: night };
  const metas = Object.entries(colours).map(([scheme, content]) =>
    Object.assign(document.createElement("meta"), { name: "theme-color", media: `(prefers-color-scheme: ${scheme})`, content }));
  document.head.append(...metas);
  const paint = () => {
    const content = colours[document.body.classList.contains("dark") ? "dark" : "light"];
    for (const one of metas) one.content = content;
  };
  const watch = () => {
    paint();
    new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  if (document.body) watch();
  else document.addEventListener("DOMContentLoaded", watch, { once: true });

  // Browsers have workers in secure contexts only: https, or this machine. Elsewhere the page works without.
  if (window.isSecureContext && "serviceWorker" in navigator) {
    navigator.serviceWorker.register("/worker.js", { scope: "/" }).catch((error) => {
      console.info(`There is no page for when the server can't be reached: ${error.message}`);  // such as a certificate that isn't trusted
    });
  }
})();
