// The service worker. It keeps the page that says that the server can't be reached, and on servers without users the
// scripts and style sheets of Gradio that have a hash in their names; never an image, an answer or a page.
const NAME = "tessera-@VERSION@";
const OFFLINE = "/offline.html";
const PAGES = @PAGES@;
const KEEPS_ASSETS = @KEEPS_ASSETS@;
const ASSET = /^(\/[a-z]{2})?\/assets\/[\w.-]+-[\w-]{8}\.(js|css)$/;

self.addEventListener("install", (event) => {
  // Waits for no other page: a worker does nothing that an open page of another version depends on.
  const keep = async () => {
    const answer = await fetch(OFFLINE, { credentials: "omit", cache: "no-store" });
    if (!answer.ok) throw new Error(`${OFFLINE}: ${answer.status}`);
    await (await caches.open(NAME)).put(OFFLINE, answer);
    await self.skipWaiting();
  };
  event.waitUntil(keep());
});

self.addEventListener("activate", (event) => {
  const tidy = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith("tessera-") && name !== NAME);
    await Promise.all(old.map((name) => caches.delete(name)));
    await self.registration.navigationPreload?.enable();
    await self.clients.claim();
  };
  event.waitUntil(tidy());
});

self.addEventListener("fetch", (event) => {
  const { request } = event, url = new URL(request.url);
  if (request.method !== "GET" || url.origin !== location.origin) return;
  if (request.mode === "navigate") {
    if (self.registration.navigationPreload || PAGES.includes(url.pathname)) event.respondWith(page(event));
  } else if (KEEPS_ASSETS && !url.search && ASSET.test(url.pathname)) {
    event.respondWith(asset(event));
  }
});

// The browser's own request is waited for: one that a worker repeats says that it is for no document, and where that came
// from a link on another site the server would refuse it. Browsers that can't do that have the page without a server for
// some addresses only.
async function page(event) {
  try {
    return (await event.preloadResponse) ?? (await fetch(event.request));
  } catch (error) {
    return (await caches.match(OFFLINE, { cacheName: NAME })) ?? Response.error();
  }
}

async function asset(event) {
  const cache = await caches.open(NAME).catch(() => null);  // a browser without room, or that keeps nothing, loads them
  const kept = await cache?.match(event.request);
  if (kept) return kept;
  const answer = await fetch(event.request);
  if (cache && answer.status === 200 && answer.type === "basic") event.waitUntil(cache.put(event.request, answer.clone()));
  return answer;
}
