// The machine at work: what the server tells four times a second, as figures, curves and a map.

import { live } from "./api.js";
import { $, bytes, decimal, h } from "./dom.js";
import { HeatMap } from "./heatmap.js";

const KEPT_SECONDS = 60; // of the curves
const RATE_SECONDS = 4; // rates are those of so long a time
const DISK_SECONDS = 1;
const PHASE_SECONDS = 10;
const AGAIN_MS = 2000;
const TELL_MS = 1000;
const PHASES = ["wait", "experts", "rest", "idle"];

const percent = (share) => (share > 0.9995 ? "100" : (100 * share).toFixed(1));

/** Difference of two counters; 0 after a restart of the server. */
const gained = (now, then, group, name) => Math.max(0, now[group][name] - then[group][name]);

function decoded(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

/** A curve of the last minute, from 0 to `top`. */
function spark(canvas, values, top) {
  const scale = devicePixelRatio;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const most = Math.max(top, ...values.map(({ value }) => value), 1e-9);
  const last = values.at(-1)?.time ?? 0;
  context.beginPath();
  for (const { time, value } of values) {
    context.lineTo(width * (1 - (last - time) / KEPT_SECONDS), height - 1.5 - (height - 3) * (value / most));
  }
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
}

export class LiveView {
  constructor() {
    this.map = new HeatMap($("map"), $("map-frame"));
    this.open = false;
    this.control = null;
    this.samples = [];
    this.curves = { tok: [], hit: [], disk: [] };
    this.shape = "";
    this.counts = { resident: 0, reading: 0, all: 0 };
    this.told = 0;
    document.addEventListener("visibilitychange", () => this.restart());
    $("map-table").addEventListener("toggle", () => this.tellMap());
  }

  /** Watch only while somebody looks. */
  setOpen(open) {
    this.open = open;
    this.restart();
  }

  restart() {
    this.control?.abort();
    this.control = null;
    if (this.open && !document.hidden) this.watch(new AbortController());
  }

  async watch(control) {
    this.control = control;
    while (this.control === control) {
      try {
        for await (const now of live(control.signal)) this.take(now);
        this.say("The server has stopped.");
      } catch (error) {
        if (error.name === "AbortError") return;
        this.say(error.message);
        if (error.status === 401) return; // until there is a key
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }

  /** Why there is nothing to see. */
  say(text) {
    $("live-state").textContent = text;
    $("live-state").hidden = !text;
    $("live-body").hidden = Boolean(text);
  }

  take(now) {
    if (now.state !== "ready") {
      this.say(now.state === "loading" ? "The model is being loaded…" : "The server stops.");
      return;
    }
    this.say("");
    if (this.samples.length && now.time < this.samples.at(-1).time) this.samples = []; // another server
    this.samples.push(now);
    while (this.samples[0].time < now.time - PHASE_SECONDS) this.samples.shift();
    this.showMap(now);
    this.showFigures(now);
    this.showPrompt(now);
    this.showPhases(now);
  }

  /** The oldest sample of the last so many seconds. */
  since(now, seconds) {
    return this.samples.find((sample) => sample.time >= now.time - seconds - 0.1);
  }

  showMap(now) {
    const shape = now.experts.join();
    if (shape !== this.shape) {
      this.shape = shape;
      this.map.shape(now.experts);
      const counts = [...new Set(now.experts.filter(Boolean))];
      $("map-shape").textContent = `${now.experts.filter(Boolean).length} layers × ${counts.join(" or ")}`;
    }
    if (now.cells !== undefined) {
      this.counts = this.map.update(decoded(now.cells));
      const { resident, reading, all } = this.counts;
      $("count-resident").textContent = resident.toLocaleString();
      $("count-reading").textContent = reading.toLocaleString();
      $("count-absent").textContent = (all - resident - reading).toLocaleString();
      $("memory").textContent = memoryNote(now, all);
    }
    if (performance.now() - this.told > TELL_MS) this.tellMap();
  }

  /** The map in words and as a table, for those who do not look. */
  tellMap() {
    this.told = performance.now();
    const { resident, reading, all } = this.counts;
    const share = Math.round((100 * resident) / all);
    $("map").ariaLabel = `Map of experts: ${resident} of ${all} are in memory, ${share} %, and ${reading} are being read. Arrow keys go through them.`;
    if (!$("map-table").open) return;
    $("map-rows").replaceChildren(
      ...this.map.rows().map(([layer, ...counts]) =>
        h("tr", {}, h("th", { scope: "row" }, String(layer)), ...counts.map((count) => h("td", {}, String(count)))),
      ),
    );
  }

  showFigures(now) {
    const then = this.since(now, RATE_SECONDS);
    const [tokens, writing] = [gained(now, then, "steps", "new_tokens"), gained(now, then, "steps", "write_seconds")];
    const rate = tokens && writing ? tokens / writing : 0;
    $("tok-rate").textContent = decimal(rate);
    const [kept, ahead, missed] = ["hits", "hits_ahead", "misses"].map((name) => gained(now, then, "store", name));
    const asked = kept + ahead + missed;
    if (asked) $("hit-rate").textContent = percent(kept / asked);
    $("ahead-rate").textContent = ahead ? `+ ${percent(ahead / asked)} % read ahead` : "";
    const recent = this.since(now, DISK_SECONDS);
    const seconds = Math.max(now.time - recent.time, 1e-3);
    const disk = gained(now, recent, "store", "bytes_read") / seconds;
    const cached = gained(now, recent, "store", "bytes_cached") / seconds;
    [$("disk-rate").textContent, $("disk-unit").textContent] = bytes(disk).split(" ");
    const { rate: ceiling, measured } = now.disk_ceiling;
    $("disk-ceiling").textContent = ceiling ? `of ${bytes(ceiling)}/s ${measured ? `measured ${measured}` : "seen at most"}` : "";
    $("disk-meter").style.width = `${ceiling ? Math.min(100, (100 * disk) / ceiling) : 0}%`;
    $("page-rate").textContent = cached ? `${bytes(cached)}/s from the page cache` : "";
    $("running").textContent = now.running;
    $("waiting").textContent = `of ${now.max_batch}${now.waiting ? `, ${now.waiting} waiting` : " together"}`;
    const hit = asked ? kept / asked : null;
    this.draw(now, { tok: rate, hit, disk }, { tok: 0, hit: 1, disk: ceiling });
  }

  draw(now, values, tops) {
    for (const [name, value] of Object.entries(values)) {
      const curve = this.curves[name];
      if (value !== null) curve.push({ time: now.time, value });
      while (curve.length && (curve[0].time < now.time - KEPT_SECONDS || curve[0].time > now.time)) curve.shift();
      spark($(`spark-${name}`), curve, tops[name]);
    }
  }

  showPrompt(now) {
    $("reading").hidden = now.prompt === null;
    if (now.prompt === null) return;
    const [done, all] = now.prompt;
    const then = this.since(now, RATE_SECONDS);
    const [tokens, seconds] = [gained(now, then, "steps", "prompt_tokens"), gained(now, then, "steps", "read_seconds")];
    const rate = tokens && seconds ? `, ${decimal(tokens / seconds)} tok/s` : "";
    $("prompt-text").textContent = `${done.toLocaleString()} of ${all.toLocaleString()}${rate}`;
    $("prompt-progress").value = done / all;
  }

  /** Where the time of the last seconds went. */
  showPhases(now) {
    const then = this.samples[0];
    const all = now.time - then.time;
    if (all < 0.2) return;
    const wait = gained(now, then, "store", "stall_seconds");
    const streaming = Math.max(wait, gained(now, then, "store", "stream_seconds"));
    const steps = Math.max(streaming, gained(now, then, "steps", "step_seconds"));
    const seconds = { wait, experts: streaming - wait, rest: steps - streaming, idle: Math.max(0, all - steps) };
    const sum = Math.max(all, steps);
    for (const name of PHASES) {
      const share = (100 * seconds[name]) / sum;
      $(`phase-${name}`).style.width = `${share}%`;
      $(`share-${name}`).textContent = `${Math.round(share)} %`;
    }
  }
}

/** What the slots hold at most. */
function memoryNote({ cache, slots, slot_bytes: size }, all) {
  if (cache === "page") return "The operating system caches experts (cache page); the map shows those in use.";
  if (cache === "none") return "Nothing is kept (cache none).";
  const place = `${slots.toLocaleString()} places of ${bytes(size)} in memory`;
  return slots >= all ? `${place}: every expert has one.` : `${place} for ${all.toLocaleString()} experts.`;
}
