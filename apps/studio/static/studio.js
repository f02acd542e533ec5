// Runs once when the page has loaded. Everything listens on the document, because Gradio redraws its parts.
() => {
  const root = document.body;
  const promptBox = () => document.querySelector("#prompt textarea");

  // Which tab is open decides what the style sheet shows.
  window.tessera = {
    go(tab) {
      const workspace = document.querySelector("#workspace");
      if (workspace) workspace.dataset.tab = tab;
    },
  };
  window.tessera.go("text");

  // The kinds of files that dialogs offer. Not set in Gradio, which would refuse others in English, and in another place
  // than everything else; the listeners refuse them.
  const KINDS = {
    "#prompt-file": ".txt,.jsonl", "#source": ".png,.jpg,.jpeg,.webp", "#ends": ".png,.jpg,.jpeg,.webp,.mp4,.webm,.gif",
    "#settings": ".png,.webp,.jpg,.jpeg,.mp4,.json", "#ft-files": ".png,.jpg,.jpeg,.webp,.txt,.mp4,.webm,.gif",
  };
  const offer = () => {
    for (const [place, kinds] of Object.entries(KINDS))
      for (const input of document.querySelectorAll(`${place} input[type=file]`))
        if (input.accept !== kinds) input.accept = kinds;
  };
  offer();

  // The image of a clip is a row of its frames: its square thumbnail shows the first one, not the middle of the row.
  const place = (image) => {
    image.style.objectPosition = image.naturalWidth >= 2 * image.naturalHeight ? "left" : "";
  };
  const thumbnails = ".thumbnail-item img";
  for (const image of document.querySelectorAll(thumbnails)) place(image);
  document.addEventListener("load", (event) => {
    if (event.target.matches?.(thumbnails)) place(event.target);
  }, true);

  // What went wrong, and a picture that was just sent to another tab, are brought into sight where they are out of it.
  let said = "", source = null;
  const bring = (element, block) => {
    const box = element.getBoundingClientRect();
    if (box.top < 0 || box.bottom > innerHeight) element.scrollIntoView({ block });
  };
  // Gradio calls a thumbnail "Thumbnail 1 of 24"; the second line of its caption, which isn't shown, says what it is.
  const name = () => {
    for (const caption of document.querySelectorAll("#strip .caption-label")) {
      const text = caption.textContent.split("\n")[1], thumbnail = caption.closest("button");
      if (text && thumbnail && thumbnail.getAttribute("aria-label") !== text) thumbnail.setAttribute("aria-label", text);
    }
  };

  // Frames of a clip side by side under it; a click shows that one. Drawn from a second copy, so that the clip plays on.
  const begun = new WeakSet(), drawn = new Set();  // the set holds copies that nothing else refers to while they load
  const film = async () => {
    const place = document.querySelector("#stage .film");
    if (!place || begun.has(place)) return;
    begun.add(place);
    const video = Object.assign(document.createElement("video"), { muted: true, preload: "auto", src: place.dataset.clip });
    const until = (event) => new Promise((resolve) => video.addEventListener(event, resolve, { once: true }));
    drawn.add(video);
    await until("loadeddata");
    const count = 8, height = 96, width = Math.round(height * video.videoWidth / video.videoHeight);
    for (let i = 0; i < count && place.isConnected; i++) {
      const time = video.duration * (i + 0.5) / count, seen = until("seeked");
      video.currentTime = time;
      await seen;
      const frame = Object.assign(document.createElement("canvas"), { width, height });
      frame.getContext("2d").drawImage(video, 0, 0, width, height);
      const button = Object.assign(document.createElement("button"), { type: "button", ariaLabel: `${time.toFixed(2)} s` });
      button.dataset.time = time;
      button.append(frame);
      place.append(button);
    }
    drawn.delete(video);
  };

  new MutationObserver(() => {
    name();
    film();
    const problem = document.querySelector("#problem .problem"), text = problem?.textContent ?? "";
    if (text && text !== said) bring(problem, "center");
    said = text;
    offer();
    const shown = document.querySelector("#source-view img")?.src ?? null;
    const isOpen = ["image", "inpaint"].includes(document.querySelector("#workspace")?.dataset.tab);
    if (shown && shown !== source && isOpen) bring(document.querySelector("#source-view"), "start");
    if (isOpen || !shown) source = shown;
  }).observe(document.querySelector("#workspace") ?? root, {
    childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ["data-tab", "aria-label"],
  });
  name();
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
    const still = event.target.closest(".film button"), clip = document.querySelector("#stage video");
    if (still && clip) {
      clip.pause();
      clip.currentTime = Number(still.dataset.time);
    }
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
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();  // else Firefox goes on to submit the line too
      document.querySelector("#generate").click();
    }
    if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
  });
}
