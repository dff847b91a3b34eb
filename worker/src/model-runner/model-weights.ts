/** The model's weights in GPU memory: q|k|v and gate|up stacked into one matrix each where their formats agree. */
import {
  copyLinearWeight,
  createLinearWeight,
  dequantizeGgml,
  type Gpu,
  type LinearWeight,
  LinearWeightMixError,
  LinearWeightSizeError,
  uploadStorage,
} from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { LoadedModel, ModelTensor } from "../model/loaded-model.ts";
import type { MemoryAccount } from "./memory-account.ts";

/** Matrices whose outputs lie side by side in a row; one matrix unless formats differ. */
export interface StackedWeight {
  /** Outputs of all parts. */
  readonly rows: number;
  readonly parts: readonly { readonly weight: LinearWeight; readonly outputOffset: number }[];
}

interface LayerWeights {
  readonly attentionNorm: GPUBuffer;
  readonly qkv: StackedWeight;
  readonly attentionOutput: StackedWeight;
  readonly feedForwardNorm: GPUBuffer;
  readonly gateUp: StackedWeight;
  readonly down: StackedWeight;
}

export interface ModelWeights {
  /** [vocabulary][hidden]. */
  readonly embedding: LinearWeight;
  readonly layers: readonly LayerWeights[];
  readonly outputNorm: GPUBuffer;
  /** The embedding itself where the model ties them. */
  readonly head: StackedWeight;
}

/** Uploads one model, tensor by tensor. */
class WeightUpload {
  readonly #gpu: Gpu;
  readonly #memory: MemoryAccount;
  readonly #model: LoadedModel;
  readonly #onProgress: (done: number, total: number) => void;
  readonly #total: number;
  /** Matrices by the names of their tensors, for those that others equal. */
  readonly #uploaded = new Map<string, LinearWeight>();
  #done = 0;

  constructor(gpu: Gpu, memory: MemoryAccount, model: LoadedModel, onProgress?: (done: number, total: number) => void) {
    this.#gpu = gpu;
    this.#memory = memory;
    this.#model = model;
    this.#onProgress = onProgress ?? (() => undefined);
    this.#total = [...model.tensors.values()].reduce((sum, tensor) => sum + tensor.bytes, 0);
  }

  #tensor(name: string): ModelTensor {
    const tensor = this.#model.tensors.get(name);
    if (tensor === undefined) throw new ClusterError("MODEL_FILE_INVALID", `tensor "${name}" is missing`);
    return tensor;
  }

  #count(tensors: readonly ModelTensor[]): void {
    for (const { bytes } of tensors) this.#done += bytes;
    this.#onProgress(this.#done, this.#total);
  }

  /** A vector, as f32. */
  vector(name: string): GPUBuffer {
    const tensor = this.#tensor(name);
    const values = dequantizeGgml(tensor.type, tensor.read(), tensor.columns);
    this.#count([tensor]);
    return this.#memory.add("weights", uploadStorage(this.#gpu, name, values));
  }

  #linear(label: string, tensors: readonly ModelTensor[]): LinearWeight {
    try {
      const same = this.#uploaded.get(tensors.map(({ sameAs }) => sameAs ?? "").join());
      const weight = same === undefined ? this.#read(label, tensors) : copyLinearWeight(this.#gpu, same, label);
      this.#uploaded.set(tensors.map(({ name }) => name).join(), weight);
      this.#memory.own("weights", weight.bytes, weight);
      this.#count(tensors);
      return weight;
    } catch (error) {
      if (error instanceof LinearWeightMixError) throw error;
      if (!(error instanceof RangeError || error instanceof LinearWeightSizeError)) throw error;
      throw new ClusterError("MODEL_UNSUPPORTED", `tensor "${label}" cannot be put on this GPU: ${error.message}`, {
        cause: error,
      });
    }
  }

  #read(label: string, tensors: readonly ModelTensor[]): LinearWeight {
    const parts = tensors.map(({ type, rows, read }) => ({ type, rows, data: read() }));
    return createLinearWeight(this.#gpu, { label, parts, columns: tensors[0]?.columns ?? 0 });
  }

  matrix(name: string): LinearWeight {
    return this.#linear(name, [this.#tensor(name)]);
  }

  stacked(label: string, names: readonly string[]): StackedWeight {
    const tensors = names.map((name) => this.#tensor(name));
    const rows = tensors.reduce((sum, tensor) => sum + tensor.rows, 0);
    try {
      return { rows, parts: [{ weight: this.#linear(label, tensors), outputOffset: 0 }] };
    } catch (error) {
      if (!(error instanceof LinearWeightMixError)) throw error;
    }
    let outputOffset = 0;
    const parts = tensors.map((tensor) => {
      const part = { weight: this.#linear(tensor.name, [tensor]), outputOffset };
      outputOffset += tensor.rows;
      return part;
    });
    return { rows, parts };
  }

  layer(index: number): LayerWeights {
    const name = (part: string) => `blk.${index}.${part}.weight`;
    return {
      attentionNorm: this.vector(name("attn_norm")),
      qkv: this.stacked(name("attn_qkv"), [name("attn_q"), name("attn_k"), name("attn_v")]),
      attentionOutput: this.stacked(name("attn_output"), [name("attn_output")]),
      feedForwardNorm: this.vector(name("ffn_norm")),
      gateUp: this.stacked(name("ffn_gate_up"), [name("ffn_gate"), name("ffn_up")]),
      down: this.stacked(name("ffn_down"), [name("ffn_down")]),
    };
  }
}

/**
 * Reads, repacks and uploads all tensors.
 * @throws ClusterError MODEL_UNSUPPORTED for a tensor that this GPU cannot hold, by its name.
 */
export async function uploadModelWeights(
  gpu: Gpu,
  memory: MemoryAccount,
  model: LoadedModel,
  onProgress?: (done: number, total: number) => void,
): Promise<ModelWeights> {
  const upload = new WeightUpload(gpu, memory, model, onProgress);
  const embedding = upload.matrix("token_embd.weight");
  const layers: LayerWeights[] = [];
  for (let index = 0; index < model.config.layers; index++) {
    layers.push(upload.layer(index));
    // Bounds the bytes that wait in the driver's upload staging to one layer.
    gpu.device.queue.submit([]);
    await gpu.device.queue.onSubmittedWorkDone();
  }
  return {
    embedding,
    layers,
    outputNorm: upload.vector("output_norm.weight"),
    head: model.config.tiedEmbedding
      ? { rows: embedding.rows, parts: [{ weight: embedding, outputOffset: 0 }] }
      : upload.stacked("output.weight", ["output.weight"]),
  };
}
