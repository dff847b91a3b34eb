/**
 * WGSL of the end of decode attention: turns and stores the new token's K and V, joins the partials of the sealed splits
 * with the f16 tokens of the residual window, and writes the attention output.
 *
 * A workgroup takes some queries of one KV head of one row. D / 8 neighbouring threads are a slot, 8 channels each; slot s
 * takes partials and tokens s, s + slots, ... with a softmax of its own, several loads in flight. The slots meet once at
 * the end, in order. In rotated formats the sealed part meets first and is rotated back.
 */
import { type ActivationOutput, PACK_HALVES_WGSL } from "./half-output.wgsl.ts";
import { each, range } from "./kv-attention-template.ts";
import type { LaneExchange } from "./kv-decode-lanes.ts";
import { queryTiles } from "./kv-decode-split.ts";
import type { KvShape } from "./kv-format.ts";
import { type QueryRope, queryRopeWgsl } from "./kv-query-rope.wgsl.ts";
import { TO_HALF_WGSL } from "./kv-write.wgsl.ts";

export interface DecodeMergeTemplate extends QueryRope {
  readonly shape: KvShape;
  /** Whether the partials are of rotated values. */
  readonly rotated: boolean;
  /** Query heads: a multiple of shape.kvHeads. */
  readonly heads: number;
  /** Query heads of one workgroup. */
  readonly queries: number;
  /** Factor of the logits. */
  readonly scale: number;
  readonly output: ActivationOutput;
  readonly exchange: LaneExchange;
  /** Tokens (partials) that a slot has in flight. */
  readonly inFlight?: number;
}

/** Threads of a workgroup. */
export const DECODE_MERGE_THREADS = 128;

/** Words of the immediate block: one, firstRow, step, splitTokens, splits. */
export const DECODE_MERGE_IMMEDIATES = 5;

/** Whether slots of D / 8 threads fit into subgroups. */
export function decodeMergeSupports(shape: KvShape): boolean {
  return [32, 64, 128, 256].includes(shape.headDim);
}

interface Plan {
  readonly template: DecodeMergeTemplate;
  readonly d: number;
  /** Threads of a slot. */
  readonly width: number;
  readonly slots: number;
  readonly queries: number;
  readonly inFlight: number;
}

function planOf(template: DecodeMergeTemplate): Plan {
  const d = template.shape.headDim;
  const width = d / 8;
  const { queries, inFlight = queries > 2 ? 2 : queries > 1 ? 4 : 8 } = template;
  return { template, d, width, slots: DECODE_MERGE_THREADS / width, queries, inFlight };
}

function exchange({ template }: Plan): string {
  if (template.exchange === "subgroup") {
    return "fn threadXor(x: f32, mask: u32, thread: u32) -> f32 { return subgroupShuffleXor(x, mask); }";
  }
  return `var<workgroup> given: array<f32, ${DECODE_MERGE_THREADS}>;
fn threadXor(x: f32, mask: u32, thread: u32) -> f32 {
  workgroupBarrier();
  given[thread] = x;
  workgroupBarrier();
  return given[thread ^ mask];
}`;
}

/** Words of the new token's K and V, and the turned queries, to workgroup memory. */
function prepareRow({ template, d, queries }: Plan): string {
  const { shape, heads } = template;
  const gqa = heads / shape.kvHeads;
  const width = (heads + 2 * shape.kvHeads) * d;
  const plane = (shape.kvHeads * shape.headDim) / 2;
  return `  for (var i = thread; i < ${d}u * params.one; i += ${DECODE_MERGE_THREADS}u) {
    let isValue = i >= ${d / 2}u; let word = i % ${d / 2}u;
    let base = row * ${width}u + ${heads * d}u + kvHead * ${d}u;
    var pair = vec2f();
    if (isValue) { let at = base + ${shape.kvHeads * d}u + 2u * word; pair = vec2f(qkv[at], qkv[at + 1u]); }
    else { pair = vec2f(turnedQuery(base, 2u * word, position), turnedQuery(base, 2u * word + 1u, position)); }
    let a = toHalf(pair.x); let b = toHalf(pair.y);
    if (firstQuery == 0u && (halfNotFinite(a) || halfNotFinite(b))) { atomicOr(&status[slot], select(1u, 2u, isValue)); }
    newRow[i / 4u][i % 4u] = a | (b << 16u);
  }
  for (var i = thread; i < ${queries * d}u * params.one; i += ${DECODE_MERGE_THREADS}u) {
    let head = kvHead * ${gqa}u + min(firstQuery + i / ${d}u, ${gqa - 1}u);
    turned[i / 4u][i % 4u] = turnedQuery(row * ${width}u + head * ${d}u, i % ${d}u, position) * ${template.scale * Math.LOG2E};
  }
  workgroupBarrier();
  // Tiles of queries that share a KV head each turn the new token; one stores it.
  if (firstQuery == 0u && thread < ${d / 4}u) {
    let isValue = thread / ${d / 8}u;
    residual[((slot * 2u + isValue) * ${shape.residualTokens}u + last) * ${plane / 4}u + kvHead * ${d / 8}u + thread % ${d / 8}u] = newRow[thread];
  }`;
}

/** Halves of a vec4u as two vec4f. */
const halves = (name: string, vector: string) =>
  `let ${name}A = vec4f(unpack2x16float(${vector}.x), unpack2x16float(${vector}.y)); let ${name}B = vec4f(unpack2x16float(${vector}.z), unpack2x16float(${vector}.w));`;

/** Joins values (two vec4f v{u}A, v{u}B) of logit s{u} and mass l{u} to the slot's state of query r. */
function join(r: number, count: number, logit: (u: number) => string, mass: (u: number) => string): string {
  const best = range(count).reduce((text, u) => `max(${text}, ${logit(u)})`, `top${r}`);
  return `{ let next = ${best}; let keep = exp2(top${r} - next); top${r} = next;
      ${each(count, (u) => `let p${u} = select(0.0, exp2(${logit(u)} - next), valid${u});`, " ")}
      total${r} = total${r} * keep; ${each(count, (u) => `total${r} = fma(p${u}, ${mass(u)}, total${r});`, " ")}
      a${r} *= keep; b${r} *= keep; ${each(count, (u) => `a${r} = fma(vec4f(p${u}), v${u}A, a${r}); b${r} = fma(vec4f(p${u}), v${u}B, b${r});`, " ")} }`;
}

function sealedLoop({ template, d, queries, slots, inFlight }: Plan): string {
  const { heads, shape } = template;
  const gqa = heads / shape.kvHeads;
  return each(
    queries,
    (r) => `  { let head = kvHead * ${gqa}u + min(firstQuery + ${r}u, ${gqa - 1}u);
    let base = (wid.y * ${heads}u + head) * params.splits * ${d / 2 + 1}u;
    for (var first = 0u; first < splits; first += ${slots * inFlight}u) {
      ${each(
        inFlight,
        (
          u,
        ) => `let i${u} = first + ${u * slots}u + mySlot; let valid${u} = i${u} < splits; let at${u} = base + min(i${u}, splits - 1u) * ${d / 2 + 1}u;
      let end${u} = partials[at${u} + ${d / 2}u]; let c${u} = at${u} + myPart * 4u;
      let v${u}A = vec4f(partials[c${u}], partials[c${u} + 1u]); let v${u}B = vec4f(partials[c${u} + 2u], partials[c${u} + 3u]);
      let s${u} = select(-1.0e30, end${u}.x, valid${u});`,
      )}
      ${join(
        r,
        inFlight,
        (u) => `s${u}`,
        (u) => `end${u}.y`,
      )}
    } }`,
  );
}

function residualLoop({ template, queries, slots, inFlight, width, d }: Plan): string {
  const { shape } = template;
  const row = (shape.kvHeads * shape.headDim) / 8;
  const masks = range(Math.log2(width)).map((i) => 1 << i);
  const reduce = (name: string) => masks.map((mask) => `${name} += threadXor(${name}, ${mask}u, thread);`).join(" ");
  return `  let newKey = newRow[myPart]; let newValue = newRow[${width}u + myPart];
${each(queries, (r) => `  let q${r}A = turned[${(r * d) / 4}u + myPart * 2u]; let q${r}B = turned[${(r * d) / 4}u + myPart * 2u + 1u];`)}
  let keyBase = slot * ${2 * shape.residualTokens * row}u + kvHead * ${width}u + myPart; let valueBase = keyBase + ${shape.residualTokens * row}u;
  for (var first = 0u; first <= last; first += ${slots * inFlight}u) {
    ${each(
      inFlight,
      (
        u,
      ) => `let i${u} = first + ${u * slots}u + mySlot; let valid${u} = i${u} <= last; let isNew${u} = i${u} >= last; let t${u} = min(i${u}, last) * ${row}u;
    let k${u} = select(residual[keyBase + t${u}], newKey, isNew${u}); let w${u} = select(residual[valueBase + t${u}], newValue, isNew${u});`,
    )}
    ${each(inFlight, (u) => `${halves(`k${u}`, `k${u}`)} ${halves(`v${u}`, `w${u}`)}`)}
    ${each(queries, (r) =>
      each(
        inFlight,
        (u) =>
          `var s${r}_${u} = dot(q${r}A, k${u}A) + dot(q${r}B, k${u}B); ${reduce(`s${r}_${u}`)} s${r}_${u} = select(-1.0e30, s${r}_${u}, valid${u});`,
      ),
    )}
    ${each(queries, (r) =>
      join(
        r,
        inFlight,
        (u) => `s${r}_${u}`,
        () => "1.0",
      ),
    )}
  }`;
}

/** Slots' states to workgroup memory. */
function storeStates({ queries, d }: Plan): string {
  return each(
    queries,
    (
      r,
    ) => `  { let at = (mySlot * ${queries}u + ${r}u) * ${d / 4}u + myPart * 2u; states[at] = a${r}; states[at + 1u] = b${r};
    if (myPart == 0u) { ends[mySlot * ${queries}u + ${r}u] = vec2f(top${r}, total${r}); } }`,
  );
}

/** Sums of `count` states for query `r` and channels 4c..4c+3: `sum`, `mass`, `top`. */
function meet({ queries, d }: Plan, count: string): string {
  return `var top = -1.0e30; for (var s = 0u; s < ${count} * params.one; s++) { top = max(top, ends[s * ${queries}u + r].x); }
    var sum = vec4f(); var mass = 0.0;
    for (var s = 0u; s < ${count} * params.one; s++) {
      let end = ends[s * ${queries}u + r]; let weight = exp2(end.x - top);
      mass = fma(end.y, weight, mass); sum = fma(states[(s * ${queries}u + r) * ${d / 4}u + c], vec4f(weight), sum);
    }`;
}

/** The sealed part meets in state `slots`, and is rotated back there. */
function unrotate(plan: Plan): string {
  const { queries, d, slots } = plan;
  const sealed = slots * queries * d;
  return `${storeStates(plan)}
  workgroupBarrier();
  for (var i = thread; i < ${(queries * d) / 4}u * params.one; i += ${DECODE_MERGE_THREADS}u) {
    let r = i / ${d / 4}u; let c = i % ${d / 4}u;
    ${meet(plan, `${slots}u`)}
    // Two of the Hadamard matrix' steps stay in a vector.
    let h = vec4f(sum.x + sum.y, sum.x - sum.y, sum.z + sum.w, sum.z - sum.w);
    states[${sealed / 4}u + i] = vec4f(h.x + h.z, h.y + h.w, h.x - h.z, h.y - h.w) * ${1 / Math.sqrt(d)};
    if (c == 0u) { ends[${slots * queries}u + r] = vec2f(top, mass); }
  }
  for (var stride = 1u; stride < ${d / 4}u * params.one; stride *= 2u) {
    workgroupBarrier();
    for (var i = thread; i < ${(queries * d) / 8}u * params.one; i += ${DECODE_MERGE_THREADS}u) {
      let at = ${sealed / 4}u + (i / stride) * 2u * stride + i % stride;
      let a = states[at]; let b = states[at + stride];
      states[at] = a + b; states[at + stride] = a - b;
    }
  }
  workgroupBarrier();
${each(queries, (r) => `  top${r} = -1.0e30; total${r} = 0.0; a${r} = vec4f(); b${r} = vec4f();`)}`;
}

function finish(plan: Plan): string {
  const { template, queries, d, slots } = plan;
  const { heads, shape, rotated, output } = template;
  const gqa = heads / shape.kvHeads;
  const value = "sum * (1.0 / mass)";
  const write = output === "f16" ? `output[at] = packHalves(${value});` : `output[at] = ${value};`;
  return `${storeStates(plan)}
  workgroupBarrier();
  for (var i = thread; i < ${(queries * d) / 4}u * params.one; i += ${DECODE_MERGE_THREADS}u) {
    let r = i / ${d / 4}u; let c = i % ${d / 4}u;
    ${meet(plan, rotated ? `select(${slots}u, ${slots + 1}u, splits > 0u)` : `${slots}u`)}
    let at = (row * ${heads}u + kvHead * ${gqa}u + firstQuery + r) * ${d / 4}u + c;
    ${gqa % queries === 0 ? write : `if (firstQuery + r < ${gqa}u) { ${write} }`}
  }`;
}

/**
 * Bindings: qkv, residual (read_write), rows, partials, output, ropeTable, status. Immediates: one (is 1), firstRow, step,
 * splitTokens, splits (stride of the partials). Grid: kvHeads × tiles of queries, rows.
 */
export function decodeMergeWgsl(template: DecodeMergeTemplate): string {
  const plan = planOf(template);
  const { shape, rotated, heads, output } = template;
  const { d, queries, slots, width } = plan;
  const { tiles } = queryTiles(heads / shape.kvHeads, queries);
  const states = slots + (rotated ? 1 : 0);
  return `requires immediate_address_space;
${template.exchange === "subgroup" ? "enable subgroups;\ndiagnostic(off, subgroup_uniformity);" : ""}
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read_write> residual: array<vec4u>;
@group(0) @binding(2) var<storage, read> rows: array<vec4u>;
@group(0) @binding(3) var<storage, read> partials: array<vec2f>;
@group(0) @binding(4) var<storage, read_write> output: array<${output === "f16" ? "vec2u" : "vec4f"}>;
@group(0) @binding(5) var<storage, read> ropeTable: array<vec2f>;
@group(0) @binding(6) var<storage, read_write> status: array<atomic<u32>>;
struct Step { one: u32, firstRow: u32, step: u32, splitTokens: u32, splits: u32 }
var<immediate> params: Step;
var<workgroup> newRow: array<vec4u, ${d / 4}>;
var<workgroup> turned: array<vec4f, ${(queries * d) / 4}>;
var<workgroup> states: array<vec4f, ${(states * queries * d) / 4}>;
var<workgroup> ends: array<vec2f, ${states * queries}>;
${exchange(plan)}
${TO_HALF_WGSL}
${output === "f16" ? PACK_HALVES_WGSL : ""}
${queryRopeWgsl(template)}
@compute @workgroup_size(${DECODE_MERGE_THREADS}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) thread: u32) {
  let kvHead = wid.x / ${tiles}u; let firstQuery = wid.x % ${tiles}u * ${queries}u;
  let row = params.firstRow + wid.y;
  let position = rows[row].x + params.step;
  let slot = rows[row].y;
  let last = position % ${shape.residualTokens}u;
  let splits = (position - last + params.splitTokens - 1u) / params.splitTokens;
  let mySlot = thread / ${width}u; let myPart = thread % ${width}u;
${each(queries, (r) => `  var top${r} = -1.0e30; var total${r} = 0.0; var a${r} = vec4f(); var b${r} = vec4f();`)}
${prepareRow(plan)}
${sealedLoop(plan)}
${rotated ? `  if (splits > 0u) {\n${unrotate(plan)}\n  }` : ""}
${residualLoop(plan)}
${finish(plan)}
}`;
}
