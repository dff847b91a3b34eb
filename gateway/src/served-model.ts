import { ClusterError, type GetModelResponse, hex } from "@kivimesh/proto";
import { ModelTokenizer } from "./tokenizer.ts";

/** A model that workers serve under one name. */
export interface ServedModel {
  readonly name: string;
  readonly digest: Uint8Array;
  readonly digestHex: string;
  readonly tokenizer: ModelTokenizer;
  readonly contextTokens: number;
  readonly vocabulary: number;
  /** Format of the worker that brought the model here; others may keep their KV otherwise. */
  readonly kvFormat: string;
  readonly endTokenIds: readonly number[];
  /** When this gateway first saw it. */
  readonly createdUnixSeconds: number;
}

/** Most models one gateway knows; beyond it, the longest known that no worker serves is forgotten for a new one. */
const maxModels = 64;

/** Models by name. One name means one set of weights; a worker that disagrees with it is refused. */
export class ModelCatalogue {
  private readonly models = new Map<string, ServedModel>();

  /**
   * The model that a worker describes; its tokenizer is built at the first sight of it. `replaceable` tells whether a
   * known model may be forgotten: no worker serves it. Throws MODEL_MISMATCH where a model with that name and other
   * weights may not, or none of `maxModels`; MODEL_UNSUPPORTED or MODEL_FILE_INVALID where its tokenizer cannot be used.
   */
  add(described: GetModelResponse, nowMs: number, replaceable: (known: ServedModel) => boolean): ServedModel {
    const digestHex = hex(described.digest);
    const known = this.models.get(described.name);
    if (known?.digestHex === digestHex) {
      return known;
    }
    if (known !== undefined && !replaceable(known)) {
      throw new ClusterError("MODEL_MISMATCH", `model ${described.name} is already served with other weights`);
    }
    const forgotten = known ?? this.oneTooMany(replaceable);
    const model: ServedModel = {
      name: described.name,
      digest: described.digest.slice(),
      digestHex,
      tokenizer: new ModelTokenizer({
        name: described.name,
        tokenizerJson: described.tokenizerJson,
        tokenizerConfigJson: described.tokenizerConfigJson,
        chatTemplate: described.chatTemplate,
        endTokenIds: described.endTokenIds,
        beginTokenId: described.beginTokenId,
      }),
      contextTokens: described.contextTokens,
      vocabulary: described.vocabulary,
      kvFormat: described.kvFormat,
      endTokenIds: described.endTokenIds,
      createdUnixSeconds: Math.floor(nowMs / 1000),
    };
    if (forgotten !== undefined) {
      this.models.delete(forgotten.name);
    }
    this.models.set(model.name, model);
    return model;
  }

  /** The model that makes place for another, where one has to. */
  private oneTooMany(replaceable: (known: ServedModel) => boolean): ServedModel | undefined {
    if (this.models.size < maxModels) {
      return undefined;
    }
    const unserved = [...this.models.values()].find(replaceable);
    if (unserved === undefined) {
      throw new ClusterError("MODEL_MISMATCH", `workers serve ${maxModels} models here already`);
    }
    return unserved;
  }

  list(): ServedModel[] {
    return [...this.models.values()].sort((left, right) => (left.name < right.name ? -1 : 1));
  }

  /** The model named `name`; for "" the only one. Throws MODEL_NOT_FOUND, or NO_WORKER while none was ever seen. */
  get(name: string): ServedModel {
    if (this.models.size === 0) {
      throw new ClusterError("NO_WORKER", "no worker has joined this gateway yet; try again shortly");
    }
    const model = name === "" && this.models.size === 1 ? this.list()[0] : this.models.get(name);
    if (model === undefined) {
      const names = this.list().map((served) => served.name);
      const problem = name === "" ? "several models are served: name one" : `no model "${name}" is served`;
      throw new ClusterError("MODEL_NOT_FOUND", `${problem}; models: ${names.join(", ")}`, { parameter: "model" });
    }
    return model;
  }
}
