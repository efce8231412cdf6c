const player = () => document.querySelector("#processed video");
const seek = (seconds) => { if (player()) player().currentTime = seconds; };

// A new stream begins at 0:00. After a change of the settings, the playhead is sent with them, and the new stream goes on
// there. `playback_position` of Gradio 6.31 does not do this: it cannot wait until the stream has got that far.
let resumePoint = null;  // the previous stream: its URL and position in seconds
const startOver = (...inputs) => {
    resumePoint = null;
    document.body.classList.remove("playing");
    document.querySelector("#processed").scrollIntoView({behavior: "smooth", block: "nearest"});
    return inputs;
};
const resume = (...inputs) => {
    const video = player();
    if (!resumePoint && video && !video.ended) resumePoint = {src: video.currentSrc, seconds: video.currentTime};
    return [...inputs.slice(0, -1), resumePoint?.seconds ?? 0];
};
const restorePosition = ({target: video, type}) => {
    if (!resumePoint || video !== player() || video.currentSrc === resumePoint.src) return;
    const {seconds} = resumePoint;
    if (video.seekable.length && video.seekable.end(0) > seconds) seek(seconds);
    else if (type !== "ended") return;
    resumePoint = null;
};
for (const type of ["canplay", "progress", "ended"]) document.addEventListener(type, restorePosition, true);

// Gradio's player does not say that it has caught up with the stream. For an upload that the browser cannot play (but
// this app may), it shows "Video not playable" and a duration of NaN.
for (const type of ["waiting", "playing", "error", "loadedmetadata"]) document.addEventListener(type, (event) => {
    if (event.target === player()) {
        document.body.classList.toggle("stalled", type === "waiting");
        if (type === "playing") document.body.classList.add("playing");
    }
    else if (event.target.closest?.("#source")) {
        document.body.classList.toggle("unplayable", type === "error");
        if (type === "error") event.stopImmediatePropagation();
    }
}, true);

// Gradio's example buttons have no names, and are made at any time after the page has loaded.
new MutationObserver(() => document.querySelectorAll(".gallery-item:not([aria-label]) video[src]").forEach((video) =>
    video.closest(".gallery-item").setAttribute("aria-label", video.src.split("/").pop()))
).observe(document, {childList: true, subtree: true});

// The select events of a table and a plot go through the server, and a plot's is for regions only.
document.addEventListener("click", ({target, clientX}) => {
    const headers = [...document.querySelectorAll("#table [role=columnheader]")].map((header) => header.innerText);
    const cells = target.closest("#table [role=row]")?.querySelectorAll("[role=gridcell]");
    const bar = document.querySelector("#progress progress");
    const ruler = target === bar ? bar : target.closest("#plot") && document.querySelector("#plot .root .background");
    if (cells?.length) seek(parseFloat(cells[headers.indexOf("First (s)")].innerText));
    if (!ruler) return;
    const {left, width} = ruler.getBoundingClientRect();
    seek(Math.min(1, Math.max(0, (clientX - left) / width)) * bar.max);
});

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
