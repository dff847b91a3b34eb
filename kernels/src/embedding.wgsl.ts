/** Kernel of `embedding.ts`. */
import { ELEMENT_THREADS } from "./element-grid.ts";
import {
  codeWords,
  scaleWords,
  scaleWordsPerGroup,
  type WeightEncoding,
  type WeightLayout,
} from "./weight-encoding.ts";

/** Body that makes `value` (vec4f) of columns 4v … 4v + 3 of row `token`. */
function decodeVector(encoding: WeightEncoding): string {
  const affine =
    encoding.scales === "none"
      ? ""
      : `
  let group = v / ${encoding.group / 4}u;
  ${encoding.scales === "pair16" ? "let pair = unpack2x16float(scaleWord(token, group));" : ""}
  ${encoding.scales === "pair32" ? "let pair = vec2f(bitcast<f32>(scaleWord(token, group * 2u)), bitcast<f32>(scaleWord(token, group * 2u + 1u)));" : ""}
  ${encoding.scales === "scale32" ? "let pair = vec2f(bitcast<f32>(scaleWord(token, group)), 0.0);" : ""}`;
  switch (encoding.format) {
    case "f32":
      return `let value = bitcast<vec4f>(vec4u(codeWord(token, v * 4u), codeWord(token, v * 4u + 1u), codeWord(token, v * 4u + 2u), codeWord(token, v * 4u + 3u)));`;
    case "f16":
      return "let value = vec4f(unpack2x16float(codeWord(token, v * 2u)), unpack2x16float(codeWord(token, v * 2u + 1u)));";
    case "bf16":
      return `let low = codeWord(token, v * 2u);
  let high = codeWord(token, v * 2u + 1u);
  let value = bitcast<vec4f>(vec4u(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));`;
    case "q8":
      return `${affine}
  let value = vec4f(unpack4xI8(codeWord(token, v))) * pair.x + pair.y;`;
    case "q4":
      // Vectors 0 … 3 of a group are the low nibbles of its four words, 4 … 7 the high ones.
      return `${affine}
  let word = codeWord(token, group * 4u + (v & 3u)) >> (v & 4u);
  let value = vec4f(unpack4xU8(word & 0x0f0f0f0fu)) * pair.x + pair.y;`;
  }
}

/** One thread a vec4 of the output; grid: x over hidden / 4, y rows. A token outside the table gives a row of NaN. */
export function embeddingWgsl(encoding: WeightEncoding, layout: WeightLayout, rows: number, hidden: number): string {
  const vectors = hidden / 4;
  const address = (word: string, wordsPerRow: number) =>
    layout === "columns" ? `${word} * ${rows}u + row` : `row * ${wordsPerRow}u + ${word}`;
  return `
@group(0) @binding(0) var<storage, read> tokens: array<u32>;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read_write> output: array<vec4u>;

fn codeWord(row: u32, word: u32) -> u32 { return codes[${address("word", codeWords(encoding, hidden))}]; }
${scaleWordsPerGroup(encoding) > 0 ? `fn scaleWord(row: u32, word: u32) -> u32 { return scales[${address("word", scaleWords(encoding, hidden))}]; }` : ""}

@compute @workgroup_size(${ELEMENT_THREADS})
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
  let v = workgroup.x * ${ELEMENT_THREADS}u + lane;
  if (v >= ${vectors}u) { return; }
  let token = tokens[workgroup.y];
  if (token >= ${rows}u) {
    output[workgroup.y * ${vectors}u + v] = vec4u(0x7fc00000u);
    return;
  }
  ${decodeVector(encoding)}
  output[workgroup.y * ${vectors}u + v] = bitcast<vec4u>(value);
}
`;
}
