/** One server-sent event with a JSON payload. */
export function sseEvent(payload: object): string {
  return `data: ${JSON.stringify(payload)}\n\n`;
}

/** What OpenAI streams end with. */
export const sseDone = "data: [DONE]\n\n";

const ssePing = ": ping\n\n";

/** Passes `source` on and adds a comment whenever it is silent for `everyMs`, so that proxies keep the connection. */
export async function* withPings(source: AsyncGenerator<string>, everyMs: number): AsyncGenerator<string> {
  let next = source.next();
  try {
    for (;;) {
      let timer: NodeJS.Timeout | undefined;
      const silence = new Promise<"silence">((resolve) => {
        timer = setTimeout(() => resolve("silence"), everyMs);
      });
      const result = await Promise.race([next, silence]);
      clearTimeout(timer);
      if (result === "silence") {
        yield ssePing;
        continue;
      }
      if (result.done) {
        return;
      }
      yield result.value;
      next = source.next();
    }
  } finally {
    // A value that is still awaited comes before the return takes effect; nobody reads it any more.
    await Promise.allSettled([next, source.return(undefined)]);
  }
}
