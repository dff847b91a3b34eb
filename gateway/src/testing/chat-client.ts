/** A chat client for tests: the `openai` package, and plain fetch where status and headers matter. */
import OpenAI from "openai";
import type { Gateway } from "../gateway.ts";

export const messages = [{ role: "user" as const, content: "hi" }];

export function client(gateway: Gateway): OpenAI {
  return new OpenAI({ baseURL: `${gateway.httpUrl}/v1`, apiKey: "unused", maxRetries: 0 });
}

/** Streams a chat. `text` grows while it runs. */
export function stream(gateway: Gateway, options: { signal?: AbortSignal; pin?: string } = {}) {
  const state = { text: "", usage: undefined as OpenAI.CompletionUsage | undefined, reason: "" };
  const headers = options.pin === undefined ? {} : { "x-kivimesh-worker": options.pin };
  const done = (async () => {
    const chunks = await client(gateway).chat.completions.create(
      { model: "scripted", messages, stream: true, stream_options: { include_usage: true } },
      { headers, ...(options.signal === undefined ? {} : { signal: options.signal }) },
    );
    for await (const chunk of chunks) {
      state.text += chunk.choices[0]?.delta.content ?? "";
      state.reason = chunk.choices[0]?.finish_reason ?? state.reason;
      state.usage = chunk.usage ?? state.usage;
    }
  })();
  done.catch(() => undefined);
  return { state, done };
}

export function ask(gateway: Gateway): Promise<Response> {
  return fetch(`${gateway.httpUrl}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model: "scripted", messages }),
  });
}

export async function codeOf(response: Response): Promise<string> {
  return ((await response.json()) as { error: { code: string } }).error.code;
}
