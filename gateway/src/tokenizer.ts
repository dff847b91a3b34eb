import { Tokenizer } from "@huggingface/tokenizers";
import { ClusterError } from "@kivimesh/proto";
import { ChatTemplate, type TemplateTokens, type Turn } from "./chat-template.ts";
import { Detokenizer } from "./detokenizer.ts";
import { type TokenPiece, tokenPieces } from "./token-pieces.ts";

/** A tokenizer as workers describe it (GetModelResponse). */
export interface TokenizerSource {
  /** Name of the model, for messages. */
  readonly name: string;
  readonly tokenizerJson: string;
  readonly tokenizerConfigJson: string;
  /** Jinja; "" where the model has none. */
  readonly chatTemplate: string;
  readonly endTokenIds: readonly number[];
  /** Put before every prompt; -1: none. */
  readonly beginTokenId: number;
}

type JsonObject = Record<string, unknown>;

/** Text to token ids and back for one model. Immutable once made. */
export class ModelTokenizer {
  private readonly name: string;
  private readonly tokenizer: Tokenizer;
  private readonly template: ChatTemplate | undefined;
  private readonly beginTokenId: number;
  private readonly silent: ReadonlySet<number>;
  private readonly added: ReadonlySet<number>;
  private readonly toPiece: (token: string, added: boolean) => TokenPiece;
  private readonly pieces = new Map<number, TokenPiece>();

  /** Throws MODEL_FILE_INVALID or MODEL_UNSUPPORTED. Takes up to a second for vocabularies of 100,000 tokens and more. */
  constructor(source: TokenizerSource) {
    const json = {
      normalizer: null,
      pre_tokenizer: null,
      post_processor: null,
      decoder: null,
      added_tokens: [],
      ...parse(source.tokenizerJson, "tokenizer.json"),
    };
    const config = source.tokenizerConfigJson === "" ? {} : parse(source.tokenizerConfigJson, "tokenizer_config.json");
    this.name = source.name;
    this.toPiece = tokenPieces(json.decoder);
    try {
      this.tokenizer = new Tokenizer(json, config);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      throw new ClusterError("MODEL_FILE_INVALID", `tokenizer of ${source.name}: ${reason}`, { cause: error });
    }
    this.beginTokenId = source.beginTokenId;
    const added = this.tokenizer.get_added_tokens_decoder();
    this.added = new Set(added.keys());
    const special = [...added.values()].filter((token) => token.special).map((token) => token.id);
    const configured = stringList(config.additional_special_tokens)
      .map((token) => this.tokenizer.token_to_id(token))
      .filter((id) => id !== undefined);
    this.silent = new Set([...special, ...configured, ...source.endTokenIds, source.beginTokenId]);
    this.template =
      source.chatTemplate === "" ? undefined : new ChatTemplate(source.chatTemplate, templateTokens(config));
  }

  /** Whether chats can be rendered. */
  get hasChatTemplate(): boolean {
    return this.template !== undefined;
  }

  /** Token ids of a text, after the model's begin token where it has one. */
  encode(text: string): number[] {
    const ids = this.tokenizer.encode(text, { add_special_tokens: false }).ids;
    return this.beginTokenId < 0 || ids[0] === this.beginTokenId ? ids : [this.beginTokenId, ...ids];
  }

  /** Token ids of a rendered conversation. Throws INVALID_ARGUMENT without a template or where it refuses `turns`. */
  encodeChat(turns: readonly Turn[]): number[] {
    if (this.template === undefined) {
      throw new ClusterError(
        "INVALID_ARGUMENT",
        `messages: model ${this.name} has no chat template; send a plain prompt to /v1/completions instead`,
        { parameter: "messages" },
      );
    }
    return this.encode(this.template.render(turns));
  }

  /** For one answer. */
  detokenizer(): Detokenizer {
    return new Detokenizer((id) => this.piece(id));
  }

  private piece(id: number): TokenPiece | undefined {
    if (this.silent.has(id)) {
      return undefined;
    }
    let piece = this.pieces.get(id);
    if (piece === undefined) {
      const token = this.tokenizer.id_to_token(id);
      if (token === undefined) {
        return undefined;
      }
      piece = this.toPiece(token, this.added.has(id));
      this.pieces.set(id, piece);
    }
    return piece;
  }
}

function parse(text: string, file: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ClusterError("MODEL_FILE_INVALID", `${file} is not JSON`, { cause: error });
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw new ClusterError("MODEL_FILE_INVALID", `${file} is not a JSON object`);
  }
  return value as JsonObject;
}

function stringList(value: unknown): string[] {
  return Array.isArray(value) ? value.filter((item): item is string => typeof item === "string") : [];
}

function templateTokens(config: JsonObject): TemplateTokens {
  const tokens: Record<string, string> = {};
  for (const name of ["bos_token", "eos_token", "unk_token", "pad_token"] as const) {
    const value = config[name];
    const content = typeof value === "object" && value !== null ? (value as JsonObject).content : value;
    if (typeof content === "string") {
      tokens[name] = content;
    }
  }
  return tokens;
}
