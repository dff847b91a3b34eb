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
import type { ModelWeights, StackedWeight } from "./model-weights.ts";
import { type BoundStackedLinear, bindStackedLinear, type LinearSettings, type Phase } from "./stacked-linear.ts";

interface BoundLayer {
  readonly attentionNorm: BoundRmsNorm;
  readonly qkv: BoundStackedLinear;
  readonly kv: KvLayer;
  readonly attentionOutput: BoundStackedLinear;
  readonly feedForwardNorm: BoundRmsNorm;
  readonly gateUp: BoundStackedLinear;
  /** Undefined where `gateUp` does it. */
  readonly gate: BoundSiluMul | undefined;
  readonly down: BoundStackedLinear;
}

export interface LayerStack {
  /**
   * Encodes embedding and all layers; the result is `activations.hidden`.
   * @param attend encodes a layer's rotary embedding, KV write and attention.
   */
  encode(pass: GPUComputePassEncoder, rows: number, attend: (layer: KvLayer) => void): void;
}

export interface LayerStackDescriptor {
  readonly config: ModelConfig;
  readonly weights: ModelWeights;
  readonly kvLayers: readonly KvLayer[];
  readonly activations: Activations;
  readonly settings: LinearSettings;
  readonly phase: Phase;
  readonly maxRows: number;
}

/** Binds all layers of a phase once. */
export async function createLayerStack(gpu: Gpu, descriptor: LayerStackDescriptor): Promise<LayerStack> {
  const { config, weights, kvLayers, activations, settings, phase, maxRows } = descriptor;
  const { hidden, normed, qkv, attention, gated } = activations;
  const [embed, norm, feed] = await Promise.all([
    createEmbedding(gpu, { weight: weights.embedding, hidden: config.hidden }),
    createRmsNorm(gpu, { hidden: config.hidden, epsilon: config.normEpsilon, output: activations.type }),
    feedForward(gpu, descriptor),
  ]);
  const tokens = phase === "prefill" ? activations.prefillTokens : activations.decodeTokens;
  const embedding = embed.bind({ tokens, output: hidden });
  const common = { settings, phase, maxRows };
  const linear = (weight: StackedWeight, input: GPUBuffer, output: GPUBuffer, accumulate: boolean) =>
    bindStackedLinear(gpu, { ...common, weight, input, output, accumulate });
  const bindLayer = async (weight: ModelWeights["layers"][number], index: number): Promise<BoundLayer> => {
    const kv = kvLayers[index];
    if (kv === undefined) throw new RangeError(`layer ${index} has no KV buffers`);
    const [ofQkv, ofAttention, ofGateUp, ofDown] = await Promise.all([
      linear(weight.qkv, normed, qkv, false),
      linear(weight.attentionOutput, attention, hidden, true),
      feed.gateUp(weight.gateUp),
      linear(weight.down, gated, hidden, true),
    ]);
    return {
      attentionNorm: norm.bind({ input: hidden, weight: weight.attentionNorm, output: normed }),
      qkv: ofQkv,
      kv,
      attentionOutput: ofAttention,
      feedForwardNorm: norm.bind({ input: hidden, weight: weight.feedForwardNorm, output: normed }),
      gateUp: ofGateUp,
      gate: feed.gate,
      down: ofDown,
    };
  };
  const layers = await Promise.all(weights.layers.map(bindLayer));
  return { encode: (pass, rows, attend) => encodeLayers(embedding, layers, pass, rows, attend) };
}

/** Gate, up and their product: one dispatch, or two where there is a buffer for what lies between. */
async function feedForward(gpu: Gpu, { config, activations, settings, phase, maxRows }: LayerStackDescriptor) {
  const { normed, gateUp, gated } = activations;
  const common = { settings, phase, maxRows, input: normed };
  if (gateUp === undefined) {
    return {
      gate: undefined,
      gateUp: (weight: StackedWeight) =>
        bindStackedLinear(gpu, { ...common, weight, output: gated, epilogue: "silu-mul" }),
    };
  }
  const silu = await createSiluMul(gpu, { width: config.feedForward, output: activations.type });
  return {
    gate: silu.bind({ gateUp, output: gated }),
    gateUp: (weight: StackedWeight) => bindStackedLinear(gpu, { ...common, weight, output: gateUp }),
  };
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
    layer.gate?.encode(pass, rows);
    layer.down.encode(pass, rows);
  }
}
