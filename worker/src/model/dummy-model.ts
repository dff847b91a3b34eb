/** Made-up models of real shapes: deterministic random weights and a byte tokenizer, for tests and benches. */
import { createHash } from "node:crypto";
import { type GgmlType, ggmlByteLength } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import { byteTokenizer } from "./byte-tokenizer.ts";
import { dummyBytes } from "./dummy-weights.ts";
import { llamaTensors, type TensorShape } from "./llama-tensors.ts";
import type { LoadedModel, ModelTensor } from "./loaded-model.ts";
import type { ModelConfig } from "./model-config.ts";

interface DummyArchitecture {
  readonly config: ModelConfig;
  /** Type of matrices; vectors are F32. */
  readonly weights: GgmlType;
  readonly embedding: GgmlType;
}

interface Shape {
  readonly layers: number;
  readonly hidden: number;
  readonly feedForward: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabulary: number;
  readonly contextTokens: number;
  readonly theta: number;
  readonly tiedEmbedding: boolean;
}

function architecture(shape: Shape, weights: GgmlType, embedding: GgmlType = weights): DummyArchitecture {
  const { theta, ...rest } = shape;
  const rope = { theta, dimensions: shape.headDim, layout: "half" as const };
  return { config: { architecture: "llama", ...rest, normEpsilon: 1e-5, rope }, weights, embedding };
}

const TINY: Shape = {
  layers: 2,
  hidden: 64,
  feedForward: 160,
  heads: 4,
  kvHeads: 2,
  headDim: 32,
  vocabulary: 320,
  contextTokens: 2048,
  theta: 10_000,
  tiedEmbedding: true,
};

const SMOLLM2: Shape = {
  layers: 30,
  hidden: 576,
  feedForward: 1536,
  heads: 9,
  kvHeads: 3,
  headDim: 64,
  vocabulary: 49_152,
  contextTokens: 8192,
  theta: 100_000,
  tiedEmbedding: true,
};

const LLAMA2: Shape = {
  layers: 32,
  hidden: 4096,
  feedForward: 11_008,
  heads: 32,
  kvHeads: 32,
  headDim: 128,
  vocabulary: 32_000,
  // Twice what it was trained on: random weights do not mind, and benches with long prompts need it.
  contextTokens: 8192,
  theta: 10_000,
  tiedEmbedding: false,
};

const LLAMA3: Shape = {
  ...LLAMA2,
  feedForward: 14_336,
  kvHeads: 8,
  vocabulary: 128_256,
  contextTokens: 131_072,
  theta: 500_000,
};

const ARCHITECTURES: ReadonlyMap<string, DummyArchitecture> = new Map([
  ["tiny-llama", architecture(TINY, "F32")],
  ["tiny-llama-mha", architecture({ ...TINY, kvHeads: 4, tiedEmbedding: false }, "F16")],
  ["tiny-llama-mqa", architecture({ ...TINY, kvHeads: 1 }, "F32")],
  ["smollm2-135m", architecture(SMOLLM2, "Q4_1", "Q8_0")],
  ["llama-2-7b", architecture(LLAMA2, "F16")],
  ["llama-3.1-8b", architecture(LLAMA3, "F16")],
]);

/** Models with more parameters have the same matrices in every layer: what is random is generated once, and copied. */
const MAX_DISTINCT_PARAMETERS = 1e9;

/** Names that `loadModel({ dummy })` takes. */
export const DUMMY_ARCHITECTURES: readonly string[] = [...ARCHITECTURES.keys()];

/**
 * @param seed other seeds give other weights. Default 0.
 * @throws ClusterError INVALID_ARGUMENT naming the known architectures.
 */
export function dummyModel(name: string, seed = 0): LoadedModel {
  const known = ARCHITECTURES.get(name);
  if (known === undefined) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `unknown architecture "${name}" for dummy weights: known are ${DUMMY_ARCHITECTURES.join(", ")}`,
      { parameter: "architecture" },
    );
  }
  const tensors = new Map<string, ModelTensor>();
  let fileBytes = 0;
  const shapes = llamaTensors(known.config);
  const isLarge = shapes.reduce((sum, { rows, columns }) => sum + rows * columns, 0) > MAX_DISTINCT_PARAMETERS;
  for (const shape of shapes) {
    const original = isLarge ? shape.name.replace(/^blk\.\d+\./, "blk.0.") : shape.name;
    const tensor = dummyTensor(known, shape, seed, original);
    tensors.set(tensor.name, tensor);
    fileBytes += tensor.bytes;
  }
  const recipe = JSON.stringify(["dummy", isLarge ? 2 : 1, name, seed, known]);
  return {
    config: known.config,
    name: `dummy-${name}`,
    digest: new Uint8Array(createHash("sha256").update(recipe).digest()),
    tensors,
    tokenizer: byteTokenizer(known.config.vocabulary),
    fileBytes,
    close: () => tensors.clear(),
  };
}

/** @param original name of the tensor whose content this one has; its own name, or that of the first layer's. */
function dummyTensor(known: DummyArchitecture, shape: TensorShape, seed: number, original: string): ModelTensor {
  const { name, rows, columns } = shape;
  const isNorm = name.endsWith("_norm.weight");
  const isTable = name === "token_embd.weight" || name === "output.weight";
  const type = isNorm ? "F32" : isTable ? known.embedding : known.weights;
  const elements = rows * columns;
  // Keeps activations near unit size through any depth: norms are one, matrices have variance 1 / inputs.
  const read = () =>
    isNorm
      ? new Uint8Array(new Float32Array(elements).fill(1).buffer)
      : dummyBytes(type, elements, 1 / Math.sqrt(columns), `${seed}/${original}`);
  const same = original === name ? {} : { sameAs: original };
  return { name, type, rows, columns, bytes: ggmlByteLength(type, elements), ...same, read };
}
