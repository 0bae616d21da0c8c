"use strict";
(() => {
  // Where status.json is, with or without a slash behind the page's own address.
  const base = location.pathname.replace(/\/*$/, "/");
  const asked = Number(new URLSearchParams(location.search).get("every"));
  const EVERY = Math.min(60, Math.max(0.25, asked || 2));
  const KEPT = 150;
  const MINUTE = Math.max(2, Math.ceil(60 / EVERY));
  const WIDTH = 400, HEIGHT = 120, LEFT = 4, TOP = 16, BOTTOM = 8;
  const TOTALS = [
    ["operations_total", "Operations"], ["operations_failed", "… failed"],
    ["operations_timed_out", "… timed out"], ["operations_cancelled", "… cancelled"],
    ["waits_total", "… had to wait for a session"],
    ["sessions_opened_total", "Sessions opened"], ["logins_total", "Logins"],
    ["logins_failed_total", "Logins refused"], ["recoveries_total", "Recoveries"],
    ["calls_lost", "Calls lost"], ["calls_stuck", "Calls stuck now"],
  ];
  const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
  const pools = new Map();

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function drawn(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const count = (value) => value < 100 && value % 1 ? tenth.format(value) : whole.format(value);

  function seconds(value) {
    if (value === null) return "–";
    const [scale, unit] = value < 0.001 ? [1e6, "µs"] : value < 1 ? [1e3, "ms"] : [1, "s"];
    const scaled = value * scale;
    return `${scaled < 10 ? tenth.format(scaled) : whole.format(scaled)} ${unit}`;
  }

  // As Histogram.percentile in Python.
  function percentile(bounds, counts, percent) {
    const all = counts.reduce((sum, one) => sum + one, 0);
    const rank = all * percent / 100;
    if (!rank) return null;
    let below = 0;
    for (let i = 0; i < counts.length; i++) {
      if (counts[i] && below + counts[i] >= rank) {
        const low = i ? bounds[i - 1] : 0, high = bounds[Math.min(i, bounds.length - 1)];
        return low + (high - low) * (rank - below) / counts[i];
      }
      below += counts[i];
    }
    return bounds[bounds.length - 1];
  }

  const between = (now, then, name) => now[name].map((one, i) => one - then[name][i]);

  // What happened between two reports of one pool.
  function step(bounds, now, then) {
    const span = now.at - then.at;
    const rate = (name) => span > 0 ? (now[name] - then[name]) / span : null;
    const run = between(now, then, "run_buckets"), wait = between(now, then, "wait_buckets");
    return {
      rate: rate("operations_total"), failed: rate("operations_failed"),
      run50: percentile(bounds, run, 50), run99: percentile(bounds, run, 99),
      wait99: percentile(bounds, wait, 99),
    };
  }

  class Chart {
    // On a logarithmic scale one slow operation does not hide all others.
    constructor(title, names, format, logarithmic) {
      this.logarithmic = logarithmic;
      this.title = title;
      this.names = names;
      this.format = format;
      this.figure = element("figure");
      this.figure.append(element("h3", title));
      this.svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
      const foot = HEIGHT - BOTTOM;
      this.svg.append(drawn("path", { class: "axis", d: `M0 ${foot}H${WIDTH}M0 ${TOP}H${WIDTH}` }));
      this.most = drawn("text", { class: "mark", x: LEFT, y: TOP - 4 });
      this.least = drawn("text", { class: "mark", x: LEFT, y: foot - 4 });
      this.svg.append(this.most, this.least);
      this.lines = names.map((_, i) => drawn("path", { class: `line ${i ? "two" : "one"}` }));
      this.svg.append(...this.lines);
      const caption = element("figcaption");
      this.keys = names.map((_, i) => element("span", "", `key ${i ? "two" : "one"}`));
      caption.append(...this.keys);
      this.figure.append(this.svg, caption);
    }

    // Of a value, how far up it is drawn, from 0 to 1; and what is at both ends.
    scale(known) {
      const most = Math.max(0, ...known);
      if (!this.logarithmic || !most) {
        return { top: most, bottom: 0, up: (value) => value / (most || 1) };
      }
      const low = Math.floor(Math.log10(Math.max(1e-6, Math.min(...known))));
      const high = Math.max(low + 1, Math.ceil(Math.log10(most)));
      const up = (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low);
      return { top: 10 ** high, bottom: 10 ** low, up };
    }

    show(series) {
      const known = series.flat().filter((value) => value !== null);
      const { top, bottom, up } = this.scale(known);
      const foot = HEIGHT - BOTTOM, most = Math.max(0, ...known);
      this.most.textContent = top ? this.format(top) : "";
      this.least.textContent = bottom ? this.format(bottom) : "";
      const told = series.map((values, i) => {
        const now = values.length ? values[values.length - 1] : null;
        const text = now === null ? "–" : this.format(now);
        this.keys[i].textContent = `${i ? "╌" : "━"} ${this.names[i]}: ${text}`;
        let path = "", pen = "M";
        values.forEach((value, at) => {
          if (value === null) { pen = "M"; return; }
          const x = WIDTH - (values.length - 1 - at) * WIDTH / (KEPT - 1);
          const y = foot - (foot - TOP) * up(value);
          path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
          // A point alone is drawn as a short line, or it would not be seen.
          path += pen === "M" ? "h.1" : "";
          pen = "L";
        });
        this.lines[i].setAttribute("d", path);
        return `${this.names[i]} ${text}`;
      });
      const label = `${this.title}: now ${told.join(", ")}; most ${this.format(most)}`;
      this.svg.setAttribute("aria-label", label);
    }
  }

  class Pool {
    constructor(name) {
      const copy = document.getElementById("pool").content.cloneNode(true);
      this.section = copy.querySelector("section");
      this.section.querySelector("h2").textContent = name;
      this.charts = {
        rate: new Chart("Operations a second", ["ended", "failed"], count),
        run: new Chart("Run time, logarithmic", ["p50", "p99"], seconds, true),
        queue: new Chart("Queue", ["waiting", "running"], count),
      };
      const places = Object.values(this.charts).map((chart) => chart.figure);
      this.section.querySelector(".charts").append(...places);
      this.tiles = new Map();
      this.reports = [];
      this.steps = [];
      document.getElementById("pools").append(this.section);
    }

    tile(name, value, note) {
      if (!this.tiles.has(name)) {
        const place = element("div"), shown = element("dd");
        place.append(element("dt", name), shown);
        this.section.querySelector(".tiles").append(place);
        this.tiles.set(name, shown);
      }
      const shown = this.tiles.get(name);
      shown.textContent = value;
      if (note) shown.append(" ", element("small", note));
    }

    badge(kind, text, feeling) {
      const shown = this.section.querySelector(`.badge.${kind}`);
      const sign = { well: "●", wait: "◐", ill: "▲" }[feeling];
      shown.textContent = `${sign} ${text}`;
      shown.className = `badge ${kind} ${feeling}`;
    }

    show(bounds, now) {
      const last = this.reports[this.reports.length - 1];
      // Another pool of the same name: the service was started anew.
      if (last && now.operations_total < last.operations_total) this.reports = this.steps = [];
      if (this.reports.length) {
        this.steps.push({ ...step(bounds, now, last), now });
      }
      this.reports = [...this.reports, now].slice(-KEPT);
      this.steps = this.steps.slice(-KEPT);
      const first = this.reports[Math.max(0, this.reports.length - 1 - MINUTE)];
      const minute = step(bounds, now, first);
      const token = now.token_label === null ? "" : `token ${now.token_label}`;
      this.section.querySelector(".token").textContent = token;
      const state = now.state === "ready" ? "well"
        : now.state === "recovering" || now.state === "opening" ? "wait" : "ill";
      this.badge("state", now.state, state);
      const who = { user: "logged in", public: "not logged in", so: "security officer in" };
      this.badge("login", who[now.login_state], now.login_state === "user" ? "well" : "wait");
      this.tile("Operations", minute.rate === null ? "–" : count(minute.rate), "a second");
      this.tile("Run time p50", seconds(minute.run50));
      this.tile("Run time p99", seconds(minute.run99));
      this.tile("Wait time p99", seconds(minute.wait99));
      this.tile("Waiting", count(now.operations_waiting));
      this.tile("Running", count(now.operations_running));
      const sessions = `of ${now.sessions_max}, ${now.sessions_leased} leased`;
      this.tile("Sessions open", count(now.sessions_open), sessions);
      const { rate, run, queue } = this.charts;
      const series = (name) => this.steps.map((one) => one[name]);
      rate.show([series("rate"), series("failed")]);
      run.show([series("run50"), series("run99")]);
      queue.show([
        this.reports.map((one) => one.operations_waiting),
        this.reports.map((one) => one.operations_running),
      ]);
      this.tables(now);
    }

    tables(now) {
      const rows = now.recent_errors.slice().reverse().map((error) => {
        const row = element("tr");
        const when = new Date(error.at * 1000).toLocaleTimeString();
        row.append(element("td", when), element("td", error.type), element("td", error.code ?? "–"));
        return row;
      });
      if (!rows.length) {
        const row = element("tr"), cell = element("td", "none");
        cell.colSpan = 3;
        row.append(cell);
        rows.push(row);
      }
      this.section.querySelector(".errors tbody").replaceChildren(...rows);
      const totals = TOTALS.map(([name, text]) => {
        const row = element("tr"), head = element("th", text);
        head.scope = "row";
        row.append(head, element("td", count(now[name])));
        return row;
      });
      this.section.querySelector(".totals tbody").replaceChildren(...totals);
    }
  }

  function told(report) {
    const names = new Set(report.pools.map((pool) => pool.name));
    for (const [name, pool] of pools) {
      if (!names.has(name)) { pool.section.remove(); pools.delete(name); }
    }
    for (const one of report.pools) {
      if (!pools.has(one.name)) pools.set(one.name, new Pool(one.name));
      pools.get(one.name).show(report.bounds, { ...one, at: report.at });
    }
  }

  const connection = document.getElementById("connection");

  function say(text, lost) {
    connection.className = lost ? "lost" : "";
    // The same words again would be read out again.
    if (connection.textContent !== text) connection.textContent = text;
  }

  async function ask() {
    if (!document.hidden) {
      try {
        const answer = await fetch(`${location.origin}${base}status.json`, { cache: "no-store" });
        if (!answer.ok) throw new Error(`status ${answer.status}`);
        const report = await answer.json();
        told(report);
        say(report.pools.length ? "Live; times and rates of the last minute" : "There is no pool", false);
      } catch (error) {
        say(`No answer (${error.message}); what is shown is old`, true);
      }
    }
    setTimeout(ask, EVERY * 1000);
  }

  ask();
})();
