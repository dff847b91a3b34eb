/** Tokenizer, chat template and end tokens of a Hugging Face model folder. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { ClusterError } from "@kivimesh/proto";
import { z } from "zod";
import { readJson } from "./json-file.ts";
import type { TokenizerDefinition } from "./loaded-model.ts";

const tokenName = z.union([z.string(), z.looseObject({ content: z.string() }).transform((token) => token.content)]);

const tokenizerConfigSchema = z.looseObject({
  bos_token: tokenName.nullish(),
  eos_token: tokenName.nullish(),
  add_bos_token: z.boolean().nullish(),
  chat_template: z.union([z.string(), z.array(z.looseObject({ name: z.string(), template: z.string() }))]).nullish(),
});

const tokenizerSchema = z.looseObject({
  added_tokens: z.array(z.looseObject({ id: z.int(), content: z.string() })).optional(),
  post_processor: z.unknown(),
  model: z.looseObject({ vocab: z.unknown() }),
});

const tokenIds = z.union([z.int().transform((id) => [id]), z.array(z.int())]);
const generationSchema = z.looseObject({ eos_token_id: tokenIds.nullish(), bos_token_id: z.int().nullish() });

function parse<T>(path: string, schema: z.ZodType<T>, json: unknown): T {
  const parsed = schema.safeParse(json);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw new ClusterError("MODEL_FILE_INVALID", `${path}: field "${issue?.path.join(".")}": ${issue?.message}`, {
    cause: parsed.error,
  });
}

function template(config: z.infer<typeof tokenizerConfigSchema>): string {
  const { chat_template: stored } = config;
  if (typeof stored === "string") return stored;
  return (stored ?? []).find(({ name }) => name === "default")?.template ?? "";
}

/** @throws ClusterError MODEL_FILE_INVALID where tokenizer.json is missing or a file is malformed. */
export function huggingFaceTokenizer(folder: string, files: readonly string[]): TokenizerDefinition {
  const path = join(folder, "tokenizer.json");
  const json = readJson(path);
  const tokenizer = parse(path, tokenizerSchema, json);
  const read = (file: string) => (files.includes(file) ? readJson(join(folder, file)) : {});
  const rawConfig = read("tokenizer_config.json");
  const config = parse(join(folder, "tokenizer_config.json"), tokenizerConfigSchema, rawConfig);
  const generation = parse(join(folder, "generation_config.json"), generationSchema, read("generation_config.json"));
  const model = parse(join(folder, "config.json"), generationSchema, read("config.json"));
  const ids = new Map((tokenizer.added_tokens ?? []).map(({ id, content }) => [content, id]));
  const idOf = (token: string | null | undefined) => (token == null ? undefined : ids.get(token));
  const ends = new Set([...(generation.eos_token_id ?? []), ...(model.eos_token_id ?? [])]);
  const end = idOf(config.eos_token);
  if (end !== undefined) ends.add(end);
  const begin = idOf(config.bos_token) ?? model.bos_token_id ?? -1;
  const addsBegin =
    config.add_bos_token ?? JSON.stringify(tokenizer.post_processor ?? "").includes("TemplateProcessing");
  const chatTemplate = files.includes("chat_template.jinja")
    ? readFileSync(join(folder, "chat_template.jinja"), "utf8")
    : template(config);
  return {
    tokenizerJson: JSON.stringify(json),
    tokenizerConfigJson: JSON.stringify(rawConfig),
    chatTemplate,
    endTokenIds: [...ends].sort((a, b) => a - b),
    beginTokenId: addsBegin ? begin : -1,
  };
}
