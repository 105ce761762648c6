// Numbers as people read them. null and undefined are a dash.

const NONE = "–";
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const oneDigit = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const shortTotal = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

export function count(n) {
  return n == null ? NONE : whole.format(n);
}

/** 1,234 but 12.3K: for narrow places. */
export function shortCount(n) {
  return n == null ? NONE : n < 10_000 ? whole.format(n) : short.format(n);
}

export function total(n) {
  return n == null ? NONE : n < 1_000_000 ? whole.format(n) : shortTotal.format(n);
}

/** Tokens a second, without the unit. */
export function rate(n) {
  return n == null ? NONE : n > 0 && n < 10 ? oneDigit.format(n) : whole.format(n);
}

export function percent(share) {
  return share == null ? NONE : whole.format(100 * share);
}

export function milliseconds(seconds) {
  if (seconds == null) return NONE;
  const ms = 1000 * seconds;
  if (ms < 0.05) return "0";
  return ms < 100 ? oneDigit.format(ms) : whole.format(ms);
}

/** A time that someone waited. */
export function seconds(s) {
  if (s == null) return NONE;
  if (s < 1) return `${milliseconds(s)} ms`;
  if (s < 10) return `${s.toFixed(2)} s`;
  return s < 100 ? `${s.toFixed(1)} s` : duration(s);
}

/** A long time, by its two largest units. */
export function duration(s) {
  if (s == null) return NONE;
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = parts.findIndex(([, size]) => s >= size);
  if (first < 0) return "0 s";
  let left = Math.floor(s);
  return parts
    .slice(first, first + 2)
    .map(([unit, size]) => {
      const n = Math.floor(left / size);
      left -= n * size;
      return n ? `${n} ${unit}` : "";
    })
    .filter(Boolean)
    .join(" ");
}

/** "1 row", "2 rows". */
export function many(n, one, more = `${one}s`) {
  return `${count(n)} ${n === 1 ? one : more}`;
}
