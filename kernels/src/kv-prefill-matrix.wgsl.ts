/**
 * WGSL of prefill attention by products of matrices: flash attention over sealed pages, then over the window's f16 rows.
 *
 * A workgroup takes a tile of rows and some query heads of one KV head. For 32 tokens at a time, keys and values are
 * unpacked once to f16 rows in workgroup memory; logits go through workgroup memory to the threads that own the queries
 * (softmax), and come back as f16 weights. A step has a part of vectors and a part of matrices, a barrier after each.
 *
 * Matrices cannot be scaled by rows. So a query keeps a reference maximum, weights are exp2(logit - reference), and only
 * where a logit exceeds its reference by more than 8 is the output taken through workgroup memory to scale that query's row
 * (all others by exactly 1). A query's bits do not depend on the other queries of its tile.
 *
 * Rotated formats: for sealed tokens q is multiplied by the Hadamard matrix, and the output once at the last one.
 */
import { each, SENTINEL } from "./kv-attention-template.ts";
import { kvPageLayout } from "./kv-layout.ts";
import {
  type PrefillMatrixContext as Context,
  EMULATED_LOAD_VECTORS,
  inPhase,
  loadVectors,
} from "./kv-prefill-matrix-context.ts";
import {
  boardLength,
  channelAt,
  KEY_TILE,
  type PrefillMatrixTemplate,
  placeOf,
  prefillMatrixSizes,
} from "./kv-prefill-matrix-plan.ts";
import { logits, products } from "./kv-prefill-matrix-products.wgsl.ts";
import { rotateRows } from "./kv-prefill-matrix-rotation.wgsl.ts";
import { largest, rescue, weights } from "./kv-prefill-matrix-softmax.wgsl.ts";
import { sealedKeys, sealedValues, stagingFunctions, windowRows } from "./kv-prefill-matrix-stage.wgsl.ts";
import { matrixDialect } from "./subgroup-matrix.ts";

/** Text: page of tile `index`, or of the last one. */
function pageOf({ template }: Context, index: string): string {
  const groups = template.shape.blockTokens / KEY_TILE;
  return `pageTable[tile.w * ${template.maxPages}u + min(${index}, count - 1u) / ${groups}u]`;
}

/** Where a side of tile `index` lies: in `page` (text), or in the window. */
function locate({ template }: Context, side: "key" | "value", sealed: boolean, index: string, page: string): string {
  const { format, shape } = template;
  if (!sealed) return `let ${side}First = min(${index}, count - 1u) * ${KEY_TILE}u;`;
  const layout = kvPageLayout(format, shape);
  return `let ${side}Start = ${page} * ${layout.page}u;
    let ${side}Page = ${side}Start + kvHead * ${layout.head}u;
    let ${side}Group = min(${index}, count - 1u) % ${shape.blockTokens / KEY_TILE}u;
    ${side === "key" && format.rotated ? `let keyNorms = keyStart + ${layout.norms}u;` : ""}`;
}

/** Text that brings tiles to workgroup memory, for one phase: sealed or window. Tiles are texts. */
function staging(context: Context, sealed: boolean) {
  const { template, s } = context;
  const values = `${KEY_TILE * s.rowVectors}u`;
  const key = sealed ? sealedKeys(template, "0u") : windowRows(template, "key", "0u");
  const value = sealed ? sealedValues(template, values) : windowRows(template, "value", values);
  const early = template.plan.loads !== "late";
  const load = (side: "key" | "value", tile: string, page: string) =>
    `${locate(context, side, sealed, tile, page)}\n${(side === "key" ? key : value).loads}`;
  return {
    declarations: `${key.declarations}\n${value.declarations}
    ${early && sealed ? `var page = ${pageOf(context, "0u")}; var nextPage = ${pageOf(context, "1u")};` : ""}`,
    /** Loads that are issued early: the keys of the tile after `tile`, and its own values. None where stores do them. */
    load: (tile: string) =>
      early
        ? `${load("key", `${tile} + 1u`, "nextPage")}\n${load("value", tile, "page")}
    ${sealed ? `page = nextPage; nextPage = ${pageOf(context, `${tile} + 2u`)};` : ""}`
        : "",
    loadFirstKeys: () => (early ? load("key", "0u", "page") : ""),
    loadMeta: (tile: string) =>
      key.metaLoads === undefined ? "" : `${locate(context, "key", sealed, tile, "page")}\n${key.metaLoads}`,
    storeKeys: (tile: string) => `${early ? "" : load("key", tile, pageOf(context, tile))}\n${key.stores}`,
    storeValues: (tile: string) => `${early ? "" : load("value", tile, pageOf(context, tile))}\n${value.stores}`,
  };
}

/**
 * The loop over tiles of a phase. Step t: softmax of tile t - 1 beside the staging of its values and of the keys of t; then
 * output += weights * values of t - 1, and the logits of t (at the end those of the last tile again, unused: a branch
 * would keep the compiler from mixing both products).
 */
function tileLoop(context: Context): string {
  const { s } = context;
  const sealed = staging(context, true);
  const window = staging(context, false);
  const either = (text: (phase: typeof sealed, masked: boolean) => string) =>
    inPhase(context, text(sealed, false), text(window, true));
  const store = (phase: typeof sealed) => `${phase.storeKeys("t")} ${phase.storeValues("t - 1u")}`;
  // One text compiles faster than two on software drivers; a device need not mask what all queries see.
  const vectors =
    context.phase === "either"
      ? `{ ${weights(context, true)} } ${either((phase) => `${phase.loadMeta("t")} ${store(phase)}`)}`
      : either((phase, masked) => `${phase.loadMeta("t")} { ${weights(context, masked)} } ${store(phase)}`);
  return `${context.phase === "either" ? `${sealed.declarations}\n${window.declarations}` : (context.phase === "sealed" ? sealed : window).declarations}
    ${either((phase) => `{ ${phase.loadFirstKeys()} } { ${phase.loadMeta("0u")} ${phase.storeKeys("0u")} } ${phase.load("0u")}`)}
    workgroupBarrier();
    ${logits(context)}
    for (var t = 1u; t <= count; t++) {
    workgroupBarrier();
    let firstToken = (t - 1u) * ${KEY_TILE}u;
    if (t == 1u && (isSealed || sealed == 0u)) { ${largest(context, true)} top = best; }
    before = total;
    ${vectors}
    if (workgroupUniformLoad(&kv[${s.d / 8}u]).x != 0u) {
    ${rescue(context)}
    }
    ${either((phase) => phase.load("t"))}
    ${products(context)}
    ${logits(context)}
    }`;
}

/** Queries as f16 rows, in rounds of a subgroup's rows: to `queries`, or through `kv` into registers. */
function loadQueries(context: Context): string {
  const { template, s, dialect, registers } = context;
  const { rowBlocks } = template.plan;
  const target = registers ? "kv[q" : `queries[(g * ${s.groupRows}u + q)`;
  const value = (k: number) =>
    `query(g * ${s.groupRows}u + q, ${channelAt(template.format.keyBits, s.d, `(v * 4u + ${k}u)`)})`;
  const take = `workgroupBarrier();
    if (rowGroup == g) {
    ${each(rowBlocks, (r) =>
      each(
        s.d / 16,
        (k) =>
          `q${r}_${k} = ${dialect
            .loadLeft("x", {
              array: "kv",
              offset: `${16 * r * s.rowVectors + 2 * k}u`,
              stride: `${s.rowVectors}u`,
              major: "row",
            })
            .replace("let x = ", "")}`,
      ),
    )}
    }`;
  return `for (var g = 0u; g < ${s.rowGroups}u * params.one; g++) {
    workgroupBarrier();
    for (var i = thread; i < ${(s.groupRows * s.d) / 4}u * params.one; i += ${s.threads}u) {
      let q = i / ${s.d / 4}u; let v = i % ${s.d / 4}u;
      board[q * ${s.boardVectors}u + v] = vec4f(${each(4, value, ", ")});
    }
    ${template.format.rotated ? inPhase(context, "rotateRows(thread);", "") : ""}
    workgroupBarrier();
    for (var i = thread; i < ${(s.groupRows * s.d) / 8}u * params.one; i += ${s.threads}u) {
      let q = i / ${s.d / 8}u; let v = i % ${s.d / 8}u;
      let x = board[q * ${s.boardVectors}u + 2u * v]; let y = board[q * ${s.boardVectors}u + 2u * v + 1u];
      ${target} * ${s.rowVectors}u + v] = vec4<u32>(halves(x.xy), halves(x.zw), halves(y.xy), halves(y.zw));
    }
    ${registers ? take : ""}
  }
  workgroupBarrier();`;
}

/** Runs `body` for each group of queries with its output as f32 rows in `board`. */
function eachOutput({ s, dialect, template }: Context, body: string): string {
  const { rowBlocks } = template.plan;
  const store = each(rowBlocks, (r) =>
    each(s.channelBlocks, (c) =>
      dialect.storeVectors(
        "board",
        "vec4f",
        `${16 * r * s.boardVectors}u + (columnGroup * ${s.channelBlocks}u + ${c}u) * 4u`,
        `${s.boardVectors}u`,
        `o${r}_${c}`,
      ),
    ),
  );
  return `for (var g = 0u; g < ${s.rowGroups}u * params.one; g++) {
    workgroupBarrier();
    if (rowGroup == g) {
    ${store}
    }
    ${body}
  }`;
}

function unrotate(context: Context): string {
  const { s, template } = context;
  const load = each(template.plan.rowBlocks, (r) =>
    each(s.channelBlocks, (c) =>
      loadVectors(
        context,
        `${16 * r * s.boardVectors}u + (columnGroup * ${s.channelBlocks}u + ${c}u) * 4u`,
        `${s.boardVectors}u`,
        `o${r}_${c}`,
      ),
    ),
  );
  return eachOutput(
    context,
    `rotateRows(thread);
    if (rowGroup == g) {
    ${load}
    }`,
  );
}

function writeOutput(context: Context): string {
  const { s, template } = context;
  const { tileRows } = template.plan;
  const half = template.output === "f16";
  const element = (channel: string) => {
    const place = placeOf(template.format.valueBits, s.d, channel);
    return `board[q * ${s.boardVectors}u + (${place} >> 2u)][${place} & 3u] * scale`;
  };
  const step = half ? 2 : 1;
  const width = s.d / step;
  const write = half
    ? `output[at] = pack2x16float(clamp(vec2f(${element("(2u * c)")}, ${element("(2u * c + 1u)")}), vec2f(-65504.0), vec2f(65504.0)));`
    : `output[at] = ${element("c")};`;
  return `workgroupBarrier();
  weights[thread >> 2u][thread & 3u] = bitcast<u32>(total);
  ${eachOutput(
    context,
    `workgroupBarrier();
    for (var i = thread; i < ${s.groupRows * width}u * params.one; i += ${s.threads}u) {
      let q = i / ${width}u; let c = i % ${width}u;
      let m = g * ${s.groupRows}u + q;
      let row = m % ${tileRows}u;
      if (row < tile.y) {
        let scale = 1.0 / (${each(s.rowThreads, (p) => `totalOf(m * ${s.rowThreads}u + ${p}u)`, " + ")});
        let at = ((tile.x + row) * ${template.heads}u + firstHead + m / ${tileRows}u) * ${width}u + c;
        ${write}
      }
    }`,
  )}`;
}

function declarations({ template, s, registers }: Context): string {
  const half = template.output === "f16";
  return `
@group(0) @binding(0) var<storage, read> qkv: array<f32>;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> kvRows: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> tiles: array<vec4u>;
@group(0) @binding(4) var<storage, read> pageTable: array<u32>;
@group(0) @binding(5) var<storage, read_write> output: array<${half ? "u32" : "f32"}>;
// one is 1: loops that the compiler must not unroll multiply their bound by it.
struct Step { one: u32, unused: u32 }
var<immediate> params: Step;
/** Keys, then values. The first row's padding says (in x) that a query's output must be scaled. */
var<workgroup> kv: array<vec4<u32>, ${2 * KEY_TILE * s.rowVectors}>;
${registers ? "" : `var<workgroup> queries: array<vec4<u32>, ${s.queries * s.rowVectors}>;`}
var<workgroup> weights: array<vec4<u32>, ${s.queries * s.weightVectors}>;
var<workgroup> board: array<vec4f, ${boardLength(s)}>;
var<private> firstRow: u32;
var<private> lastRow: u32;
var<private> firstHead: u32;
fn totalOf(thread: u32) -> f32 { return bitcast<f32>(weights[thread >> 2u][thread & 3u]); }
fn halves(x: vec2f) -> u32 { return pack2x16float(clamp(x, vec2f(-65504.0), vec2f(65504.0))); }
/** Query m of the workgroup, with the factor of the logits, in powers of two. */
fn query(m: u32, channel: u32) -> f32 {
  let row = min(firstRow + m % ${template.plan.tileRows}u, lastRow);
  return qkv[row * ${(template.heads + 2 * template.shape.kvHeads) * s.d}u + (firstHead + m / ${template.plan.tileRows}u) * ${s.d}u + channel] * ${template.scale * Math.LOG2E};
}
${stagingFunctions(template)}
${template.format.rotated ? rotateRows(s) : ""}`;
}

/** Sealed tokens in the first phase, the window's in the second. */
function phases(context: Context): string {
  const { template, s } = context;
  const sealedTiles = `sealed / ${KEY_TILE}u`;
  const windowTiles = `last / ${KEY_TILE}u + 1u`;
  const own = `inWindow + (thread / ${s.rowThreads}u) % ${template.plan.tileRows}u`;
  const body = (part: Context) => `
${loadQueries(part)}
${tileLoop(part)}
    ${template.format.rotated ? inPhase(part, unrotate(part), "") : ""}`;
  if (template.plan.loads === "late") {
    return `  for (var phase = 0u; phase < 2u * params.one; phase++) {
    let isSealed = phase == 0u;
    let count = select(${windowTiles}, ${sealedTiles}, isSealed);
    let see = select(${own}, 0xffffffffu, isSealed);
    if (count > 0u) { ${body(context)} }
  }`;
  }
  // Written twice, so that words loaded ahead take registers in one phase only.
  return `  if (sealed > 0u) {
    let count = ${sealedTiles}; let see = 0xffffffffu; const isSealed = true;
    ${body({ ...context, phase: "sealed" })}
  }
  {
    let count = ${windowTiles}; let see = ${own}; const isSealed = false;
    ${body({ ...context, phase: "window" })}
  }`;
}

/**
 * Bindings: qkv, pages, half (chunkKv), tiles, pageTable, output. Grid: tiles, heads / queryHeads; the longest tiles, which
 * the tables hold last, start first. @throws RangeError where plan and shape do not fit.
 */
export function prefillMatrixWgsl(template: PrefillMatrixTemplate): string {
  const s = prefillMatrixSizes(template);
  const dialect = matrixDialect(template.dialect);
  const registers = template.plan.queries === "registers";
  const context: Context = { template, s, dialect, registers, phase: "either" };
  const { plan, heads, shape } = template;
  const headGroups = heads / plan.queryHeads;
  const needsHalf = template.arithmetic === "f16" && template.dialect === "emulated";
  const outputs = each(plan.rowBlocks, (r) =>
    each(s.channelBlocks, (c) => `  var o${r}_${c} = ${dialect.zero};`, "\n"),
  );
  const matrices = registers
    ? each(plan.rowBlocks, (r) => each(s.d / 16, (k) => `  var q${r}_${k}: subgroup_matrix_left<f16, 16, 16>;`))
    : "";
  const main = `
@compute @workgroup_size(${s.threads}) fn main(@builtin(workgroup_id) wid: vec3u, @builtin(num_workgroups) grid: vec3u, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % 32u;
  let rowGroup = thread / ${32 * plan.columnGroups}u;
  let columnGroup = (thread / 32u) % ${plan.columnGroups}u;
  let rowBase = rowGroup * ${s.groupRows}u;
  let work = wid.y * grid.x + wid.x;
  let tile = tiles[grid.x * grid.y / ${headGroups}u - 1u - work / ${headGroups}u];
  firstHead = (work % ${headGroups}u) * ${plan.queryHeads}u;
  let kvHead = firstHead / ${heads / shape.kvHeads}u;
  firstRow = tile.x;
  lastRow = tile.x + tile.y - 1u;
  let inWindow = tile.z % ${shape.residualTokens}u;
  let sealed = tile.z - inWindow;
  let part = thread % ${s.rowThreads}u;
  let logitRow = (thread / ${s.rowThreads}u) * ${s.logitVectors}u;
  let weightRow = (thread / ${s.rowThreads}u) * ${s.weightVectors}u;
  let last = inWindow + tile.y - 1u;
  let halfBase = (firstRow - inWindow) * ${(shape.kvHeads * s.d) / 4}u + kvHead * ${s.d / 8}u;
  if (thread == 0u) { kv[${s.d / 8}u].x = 0u; }
  var top = ${SENTINEL};
  var total = 0.0;
  // The total before the last tile.
  var before = 0.0;
${outputs}
${matrices}
${phases(context)}
${writeOutput(context)}
}`;
  return `${dialect.directives}
${needsHalf ? "enable f16;" : ""}
requires immediate_address_space;
${declarations(context)}
${template.dialect === "emulated" ? EMULATED_LOAD_VECTORS : ""}
${main}
${dialect.functions()}`;
}
