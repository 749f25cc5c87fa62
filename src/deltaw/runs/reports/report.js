"use strict";
(() => {
  const number = (v) => {
    const size = Math.abs(v);
    if (v === 0 || Number.isInteger(v) && size < 1e7) return v.toLocaleString("en");
    return size >= 1e7 || size < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(4)));
  };
  const make = (name, kind, text) => {
    const node = document.createElement(name);
    node.className = kind;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const nearest = (points, x, scale) => {
    let best = -1, gap = Infinity;
    points.forEach((p, i) => { const d = Math.abs(scale(p[0]) - x); if (d < gap) { gap = d; best = i; } });
    return best;
  };

  for (const plot of document.querySelectorAll(".plot[data-chart]")) {
    const data = JSON.parse(plot.dataset.chart);
    const scale = data.log ? Math.log10 : (v) => v;
    const rule = make("div", "rule"), tip = make("div", "tip");
    rule.hidden = tip.hidden = true;
    plot.append(rule, tip);
    const hide = () => { rule.hidden = tip.hidden = true; };
    const show = (event) => {
      const box = plot.getBoundingClientRect();
      const [low, high] = data.x.map(scale);
      const at = low + (event.clientX - box.left) / box.width * (high - low);
      const hits = data.series.map((s) => [s, nearest(s.points, at, scale)]).filter(([, i]) => i >= 0);
      if (!hits.length) return hide();
      const x = hits.map(([s, i]) => s.points[i][0]).reduce((a, b) => Math.abs(scale(b) - at) < Math.abs(scale(a) - at) ? b : a);
      tip.replaceChildren(make("p", "", number(x)));
      for (const [s, i] of hits) {
        const row = make("p", ""), label = s.labels ? s.labels[i] : "";
        row.append(make("span", "swatch line c" + s.color), make("span", "", label || s.name), make("b", "", number(s.points[i][1])));
        if (s.points[i][0] !== x) row.append(make("small", "", "at " + number(s.points[i][0])));
        tip.append(row);
      }
      rule.hidden = tip.hidden = false;
      const left = (scale(x) - low) / (high - low) * box.width;
      rule.style.left = left + "px";
      const most = box.width - tip.offsetWidth;
      tip.style.left = Math.max(0, Math.min(most, left < box.width / 2 ? left + 14 : left - tip.offsetWidth - 14)) + "px";
    };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", hide);
  }

  for (const command of document.querySelectorAll(".command")) {
    const button = make("button", "copy", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      const code = command.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      } catch {
        getSelection().selectAllChildren(code);
      }
    });
    command.append(button);
  }
})();
