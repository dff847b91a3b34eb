/** The transformer layers of one phase, from tokens to the final residual stream. */
import {
  type BoundEmbedding,
  type BoundRmsNorm,
  type BoundSiluMul,
  createEmbedding,
  createRmsNorm,
  createSiluMul,
  type Gpu,
  type KvLayer,
} from "@kivimesh/kernels";
import type { ModelConfig } from "../model/model-config.ts";
import type { Activations } from "./activations.ts";
import type { ModelWeights } from "./model-weights.ts";
import { type BoundStackedLinear, bindStackedLinear, type Phase } from "./stacked-linear.ts";

interface BoundLayer {
  readonly attentionNorm: BoundRmsNorm;
  readonly qkv: BoundStackedLinear;
  readonly kv: KvLayer;
  readonly attentionOutput: BoundStackedLinear;
  readonly feedForwardNorm: BoundRmsNorm;
  readonly gateUp: BoundStackedLinear;
  readonly gate: BoundSiluMul;
  readonly down: BoundStackedLinear;
}

export interface LayerStack {
  /**
   * Encodes embedding and all layers; the result is `activations.hidden`.
   * @param attend encodes a layer's rotary embedding, KV write and attention.
   */
  encode(pass: GPUComputePassEncoder, rows: number, attend: (layer: KvLayer) => void): void;
}

/** Binds all layers of a phase once. */
export async function createLayerStack(
  gpu: Gpu,
  config: ModelConfig,
  weights: ModelWeights,
  kvLayers: readonly KvLayer[],
  activations: Activations,
  phase: Phase,
  maxRows: number,
): Promise<LayerStack> {
  const { hidden, normed, qkv, attention, gateUp, gated } = activations;
  const embed = await createEmbedding(gpu, { weight: weights.embedding, hidden: config.hidden });
  const norm = await createRmsNorm(gpu, { hidden: config.hidden, epsilon: config.normEpsilon });
  const silu = await createSiluMul(gpu, { width: config.feedForward });
  const tokens = phase === "prefill" ? activations.prefillTokens : activations.decodeTokens;
  const embedding = embed.bind({ tokens, output: hidden });
  const gate = silu.bind({ gateUp, output: gated });
  const common = { phase, maxRows };
  const layers: BoundLayer[] = [];
  for (const [index, weight] of weights.layers.entries()) {
    const kv = kvLayers[index];
    if (kv === undefined) throw new RangeError(`layer ${index} has no KV buffers`);
    const linear = (stacked: typeof weight.qkv, input: GPUBuffer, output: GPUBuffer, accumulate: boolean) =>
      bindStackedLinear(gpu, { ...common, weight: stacked, input, output, accumulate });
    layers.push({
      attentionNorm: norm.bind({ input: hidden, weight: weight.attentionNorm, output: normed }),
      qkv: await linear(weight.qkv, normed, qkv, false),
      kv,
      attentionOutput: await linear(weight.attentionOutput, attention, hidden, true),
      feedForwardNorm: norm.bind({ input: hidden, weight: weight.feedForwardNorm, output: normed }),
      gateUp: await linear(weight.gateUp, normed, gateUp, false),
      gate,
      down: await linear(weight.down, gated, hidden, true),
    });
  }
  return { encode: (pass, rows, attend) => encodeLayers(embedding, layers, pass, rows, attend) };
}

function encodeLayers(
  embedding: BoundEmbedding,
  layers: readonly BoundLayer[],
  pass: GPUComputePassEncoder,
  rows: number,
  attend: (layer: KvLayer) => void,
): void {
  embedding.encode(pass, rows);
  for (const layer of layers) {
    layer.attentionNorm.encode(pass, rows);
    layer.qkv.encode(pass, rows);
    attend(layer.kv);
    layer.attentionOutput.encode(pass, rows);
    layer.feedForwardNorm.encode(pass, rows);
    layer.gateUp.encode(pass, rows);
    layer.gate.encode(pass, rows);
    layer.down.encode(pass, rows);
  }
}
