const player = () => document.querySelector("#processed video");
const bar = () => document.querySelector("#progress progress");
const mark = (state, isOn) => document.body.classList.toggle(state, isOn);  // page.css shows it
const showPlayer = () => document.querySelector("#screen").scrollIntoView({behavior: "smooth", block: "nearest"});

// WebKit (every iPhone) does not let a video with sound start by itself: it refuses, or pauses as soon as there is sound.
// Muted and inside the page, it may play. Gradio 6.31 turns the sound on again with each chunk, unless it cannot.
const playMuted = (video) => {
    video.muted = true;
    Object.defineProperty(video, "muted", {get: () => true, set: () => {}, configurable: true});
    mark("muted", true);
    if (video.readyState > 1) video.play();  // else `loadeddata` comes: WebKit stalls if it has to play before
};
const play = (video) => {
    video.playsInline = true;
    return video.play().catch(({name}) => name === "NotAllowedError" && playMuted(video));
};
const isPausedByBrowser = ({played, muted, ended}) =>
    !muted && !ended && !(played.length && played.end(0) - played.start(0) > 1) &&
    !document.querySelector("#processed:is(:hover, :focus-within)");
const turnSoundOn = () => {
    const video = player();
    delete video.muted;
    mark("muted", video.muted = false);
    video.play();
};

// A new stream begins at 0:00. After a change of the settings, the playhead is sent with them, and the new stream goes on
// where the viewer is when it arrives, or if it does not reach so far, where they were at the change. `playback_position`
// of Gradio 6.31 does not do this: it cannot wait until the stream has got that far.
let resumePoint = null;  // the previous stream: its URL, and its position in seconds at the change and now
const startOver = (...inputs) => {
    resumePoint = null;
    for (const state of ["playing", "beyond", "muted", "updating"]) mark(state, false);
    showPlayer();
    return inputs;
};
const resume = (source, threshold, playhead, ...options) => {
    const video = player();
    const seconds = video && !video.ended ? video.currentTime : 0;
    if (!resumePoint && video) resumePoint = {src: video.currentSrc, seconds, now: seconds};
    mark("updating", true);
    return [source, threshold, resumePoint?.seconds ?? 0, ...options];
};
const restorePosition = ({target: video, type}) => {
    if (!resumePoint || video !== player()) return;
    const {src, seconds, now} = resumePoint, end = video.seekable.length && video.seekable.end(0);
    if (video.currentSrc === src) {
        if (seconds) resumePoint.now = video.currentTime;
        return;
    }
    if (end > seconds) video.currentTime = end > now ? now : seconds;
    else if (type !== "ended") return;
    resumePoint = null;
    mark("updating", false);
};
for (const type of ["timeupdate", "canplay", "progress", "ended"]) document.addEventListener(type, restorePosition, true);

// Gradio's player does not say that it has caught up with the stream. For an upload that the browser cannot play (but
// this app may), it shows "Video not playable" and a duration of NaN.
for (const type of ["loadedmetadata", "loadeddata", "waiting", "playing", "pause", "error"]) {
    document.addEventListener(type, (event) => {
        const {target: video} = event;
        if (video.videoHeight && video.closest("#source, #processed"))
            document.body.style.setProperty("--shape", video.videoWidth / video.videoHeight);
        if (video === player()) {
            mark("stalled", type === "waiting");
            if (type === "loadeddata") play(video);
            if (type === "pause" && isPausedByBrowser(video)) playMuted(video);
            if (type === "playing") mark("playing", true);
        }
        else if (video.closest?.("#source")) {
            mark("unplayable", type === "error");
            if (type === "error") event.stopImmediatePropagation();
        }
    }, true);
}

// Gradio's example buttons have no names, and are made at any time after the page has loaded.
new MutationObserver(() => document.querySelectorAll(".gallery-item:not([aria-label]) video[src]").forEach((video) =>
    video.closest(".gallery-item").setAttribute("aria-label", video.src.split("/").pop()))
).observe(document, {childList: true, subtree: true});

// A click on a picture, a row, the timeline or the bar moves the player. A table's select event goes through the server.
const secondsAt = ({target, clientX}) => {
    const picture = target.closest("[data-seconds]");
    if (picture) return +picture.dataset.seconds;
    const table = target.closest("#table, #crossings");
    const headers = [...table?.querySelectorAll("[role=columnheader], th") ?? []].map((header) => header.innerText);
    const cells = target.closest("#table [role=row], #crossings tr")?.querySelectorAll("[role=gridcell], td");
    if (cells?.length) return parseFloat(cells[headers.indexOf("First (s)")].innerText);
    const ruler = target === bar() ? bar() : target.closest("#timeline") && document.querySelector(".ruler");
    if (!ruler) return NaN;
    const {left, width} = ruler.getBoundingClientRect();
    return Math.min(1, Math.max(0, (clientX - left) / width)) * bar().max;
};
document.addEventListener("click", (event) => {
    const seconds = secondsAt(event);
    if (!(player() && seconds >= 0)) return;
    mark("beyond", seconds > player().duration + 0.5);
    if (!document.body.matches(".beyond")) player().currentTime = seconds;
    showPlayer();
});
document.addEventListener("mousemove", (event) => {
    event.target.closest("#table [title=Objects]")?.setAttribute("title", "Counted once seen for a second");
    const seconds = Math.floor(secondsAt(event));
    if (!(player() && seconds >= 0)) return;
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    event.target.closest("[data-seconds], #table [role=row], #crossings tr, #timeline, #progress").title = `Jump to ${clock}`;
});
document.addEventListener("timeupdate", ({target: video}) => {
    if (video !== player() || !bar()) return;
    document.body.style.setProperty("--playhead", video.currentTime / bar().max);
}, true);

// Gradio's slider reports each keystroke in its number box, even an empty box or a number out of range, which it then
// refuses with an error over the player. Here, such a value never leaves the box. When the box loses the focus, the
// number is clamped, and an empty box gets its last good one back.
let lastGood;
for (const type of ["focusin", "input", "focusout"]) document.addEventListener(type, (event) => {
    const box = event.target;
    if (!box.matches?.("#threshold input[type=number]")) return;
    if (box.value && +box.value >= +box.min && +box.value <= +box.max) lastGood = box.value;
    else if (type === "input") event.stopImmediatePropagation();
    else if (type === "focusout") {
        box.value = box.value ? Math.min(box.max, Math.max(box.min, box.value)) : lastGood;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }
}, true);
