import { type DestinationStream, destination, type Logger, pino } from "pino";

export type LogLevel = "fatal" | "error" | "warn" | "info" | "debug" | "trace" | "silent";

/** Names under which what users write, or secrets, could come by; their values are never logged. */
const redactedNames = [
  "prompt",
  "messages",
  "text",
  "content",
  "completion",
  "tokens",
  "ids",
  "stop",
  "authorization",
  "apiKey",
  "secret",
  "clusterSecret",
  "password",
];

/** A JSON logger on standard error (standard output belongs to results). Prompts, completions and secrets are cut out. */
export function createLogger(name: string, level: LogLevel = "info", stream?: DestinationStream): Logger {
  const paths = redactedNames.flatMap((field) => [field, `*.${field}`, `*.*.${field}`]);
  return pino({ name, level, redact: { paths, censor: "[redacted]" } }, stream ?? destination({ dest: 2, sync: true }));
}

export type { Logger };
