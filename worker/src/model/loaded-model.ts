/** A model opened from disk or made up: its shape, its tensors (read on demand) and its tokenizer. */
import type { GgmlType } from "@kivimesh/kernels";
import type { ModelConfig } from "./model-config.ts";

/** One weight matrix or vector, row-major: `rows` outputs of `columns` inputs. */
export interface ModelTensor {
  /** Name in the GGUF convention: `token_embd.weight`, `blk.0.attn_q.weight`, ... */
  readonly name: string;
  readonly type: GgmlType;
  /** 1 for vectors. */
  readonly rows: number;
  readonly columns: number;
  readonly bytes: number;
  /** Name of a tensor before it with the same type, shape and bytes: on the GPU it may be copied instead of read. */
  readonly sameAs?: string;
  /** The tensor's bytes, read or generated anew at each call. */
  read(): Uint8Array;
}

/** What a gateway needs to tokenize and render chats; from the model's own file. */
export interface TokenizerDefinition {
  /** In the layout of a Hugging Face `tokenizer.json`. */
  readonly tokenizerJson: string;
  /** In the layout of a Hugging Face `tokenizer_config.json`. */
  readonly tokenizerConfigJson: string;
  /** Jinja; "" where the model has none. */
  readonly chatTemplate: string;
  /** Tokens that end an answer. */
  readonly endTokenIds: readonly number[];
  /** Token put before every prompt, or -1. */
  readonly beginTokenId: number;
}

export interface LoadedModel {
  readonly config: ModelConfig;
  /** File or folder name without its extension, or the dummy architecture. */
  readonly name: string;
  /** SHA-256 of the weights' file(s), or of the dummy's recipe: 32 bytes. Part of every KV block's identity. */
  readonly digest: Uint8Array;
  /** By GGUF name. `output.weight` is absent where the embedding is tied. */
  readonly tensors: ReadonlyMap<string, ModelTensor>;
  readonly tokenizer: TokenizerDefinition;
  /** Bytes on disk; for dummy weights, the bytes they would take. */
  readonly fileBytes: number;
  /** Closes the files. Tensors cannot be read afterwards. */
  close(): void;
}

/** From a file: `path` is a .gguf file or a folder with config.json, tokenizer.json and safetensors. */
export type ModelSource =
  | { readonly path: string; readonly name?: string }
  | { readonly dummy: string; readonly seed?: number };
