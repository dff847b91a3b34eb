/** Kernels of `rms-norm.ts`. */
import { type ActivationOutput, outputElement, outputFunctions, outputValue } from "./half-output.wgsl.ts";

export interface RmsNormTemplate {
  readonly hidden: number;
  readonly epsilon: number;
  /** Reads the row's index from `rowIndices`. */
  readonly gathered: boolean;
  readonly output: ActivationOutput;
  /**
   * `loops`: 64 threads that meet in workgroup memory, for software drivers.
   * `registers`: the row stays in registers between its two uses, and subgroups add.
   */
  readonly variant: "loops" | "registers";
  /** Threads of a workgroup of `registers`. Default: by the row's length. */
  readonly threads?: number;
}

const LOOP_THREADS = 64;
/** Least size of a subgroup that drivers have: bounds the partial sums of a workgroup. */
const LEAST_SUBGROUP = 4;
/** Most vec4s of a thread that are kept in registers. */
const MOST_REGISTERS = 8;

/** Threads of a workgroup. */
export function rmsNormThreads({ hidden, variant, threads }: RmsNormTemplate): number {
  if (variant === "loops") return LOOP_THREADS;
  if (threads !== undefined) return threads;
  const vectors = hidden / 4;
  return [64, 128].find((threads) => vectors <= 2 * threads) ?? 256;
}

/** One workgroup a row; grid: x rows. */
export function rmsNormWgsl(template: RmsNormTemplate): string {
  const { hidden, gathered, output, variant } = template;
  const vectors = hidden / 4;
  return `${variant === "registers" ? "enable subgroups;" : ""}
@group(0) @binding(0) var<storage, read> input: array<vec4f>;
@group(0) @binding(1) var<storage, read> weight: array<vec4f>;
@group(0) @binding(2) var<storage, read_write> output: array<${outputElement(output)}>;
${gathered ? "@group(0) @binding(3) var<storage, read> rowIndices: array<u32>;" : ""}
${outputFunctions(output)}
${variant === "registers" ? registersText(template) : loopsText(template)}`
    .replaceAll("SOURCE", `${gathered ? "rowIndices[group.x]" : "group.x"} * ${vectors}u`)
    .replaceAll("TARGET", `group.x * ${vectors}u`);
}

function scaleText({ hidden, epsilon }: RmsNormTemplate): string {
  return `let scale = 1.0 / sqrt(total / ${hidden.toFixed(1)} + ${epsilon.toExponential()});`;
}

function loopsText(template: RmsNormTemplate): string {
  const vectors = template.hidden / 4;
  return `
var<workgroup> partials: array<f32, ${LOOP_THREADS}>;

@compute @workgroup_size(${LOOP_THREADS})
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) lane: u32) {
  let source = SOURCE;
  var squares = vec4f();
  for (var at = lane; at < ${vectors}u; at += ${LOOP_THREADS}u) {
    let value = input[source + at];
    squares = fma(value, value, squares);
  }
  partials[lane] = (squares.x + squares.y) + (squares.z + squares.w);
  workgroupBarrier();
  var total = 0.0;
  for (var other = 0u; other < ${LOOP_THREADS}u; other++) { total += partials[other]; }
  ${scaleText(template)}
  for (var at = lane; at < ${vectors}u; at += ${LOOP_THREADS}u) {
    output[TARGET + at] = ${outputValue(template.output, "input[source + at] * scale * weight[at]")};
  }
}
`;
}

/** All loads of a thread are in flight at once; what does not fit the registers is read again. */
function registersText(template: RmsNormTemplate): string {
  const vectors = template.hidden / 4;
  const threads = rmsNormThreads(template);
  const steps = Math.ceil(vectors / threads);
  const kept = Array.from({ length: Math.min(steps, MOST_REGISTERS) }, (_, step) => step);
  const whole = (step: number) => (step + 1) * threads <= vectors;
  const at = (step: number) => `lane + ${step * threads}u`;
  const guarded = (step: number, statement: string) =>
    whole(step) ? statement : `if (${at(step)} < ${vectors}u) { ${statement} }`;
  const store = (index: string, value: string) =>
    `output[TARGET + ${index}] = ${outputValue(template.output, `${value} * scale * weight[${index}]`)};`;
  const rest =
    steps > MOST_REGISTERS
      ? (body: string) =>
          `for (var at = lane + ${MOST_REGISTERS * threads}u; at < ${vectors}u; at += ${threads}u) { ${body} }`
      : () => "";
  return `
var<workgroup> partials: array<f32, ${threads / LEAST_SUBGROUP}>;

@compute @workgroup_size(${threads})
fn main(
  @builtin(workgroup_id) group: vec3u,
  @builtin(local_invocation_index) lane: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) inSubgroup: u32,
) {
  let source = SOURCE;
${kept.map((step) => `  var x${step} = vec4f();\n  ${guarded(step, `x${step} = input[source + ${at(step)}];`)}`).join("\n")}
  var squares = vec4f();
${kept.map((step) => `  squares = fma(x${step}, x${step}, squares);`).join("\n")}
  ${rest("let value = input[source + at]; squares = fma(value, value, squares);")}
  let sum = subgroupAdd((squares.x + squares.y) + (squares.z + squares.w));
  if (inSubgroup == 0u) { partials[lane / size] = sum; }
  workgroupBarrier();
  var total = 0.0;
  for (var other = 0u; other < ${threads}u / size; other++) { total += partials[other]; }
  ${scaleText(template)}
${kept.map((step) => `  ${guarded(step, store(at(step), `x${step}`))}`).join("\n")}
  ${rest(store("at", "input[source + at]"))}
}
`;
}
