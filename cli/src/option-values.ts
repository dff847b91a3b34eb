/** Parsers of option values: each says what is allowed. Used for flags and their environment twins alike. */
import { type Command, InvalidArgumentError, Option } from "commander";
import { UsageError } from "./usage-error.ts";

const LARGEST_PORT = 65_535;

/** A whole number of at least `minimum` and at most `maximum`. */
export function integer(minimum: number, maximum = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text.trim()) || value < minimum || value > maximum) {
      const range = maximum === Number.MAX_SAFE_INTEGER ? `of at least ${minimum}` : `from ${minimum} to ${maximum}`;
      throw new InvalidArgumentError(`expected a whole number ${range}, got "${text}"`);
    }
    return value;
  };
}

/** A number from `minimum` to `maximum`. */
export function decimal(minimum: number, maximum: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (text.trim() === "" || !(value >= minimum && value <= maximum)) {
      throw new InvalidArgumentError(`expected a number from ${minimum} to ${maximum}, got "${text}"`);
    }
    return value;
  };
}

export const port = integer(0, LARGEST_PORT);

const BINARY_UNITS: Readonly<Record<string, number>> = { "": 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** Bytes: "1048576", "512MiB" or "2G"; all units are powers of 1024. */
export function bytes(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?$/i.exec(text.trim());
  const unit = BINARY_UNITS[(match?.[2] ?? "?").toUpperCase()];
  if (match === null || unit === undefined || Number(match[1]) * unit < 1) {
    throw new InvalidArgumentError(`expected bytes such as 1048576, 512MiB or 2GiB, got "${text}"`);
  }
  return Math.floor(Number(match[1]) * unit);
}

/** `host:port`, the host perhaps an IPv6 address in brackets. */
export function address(text: string): string {
  const match = /^(?:\[[0-9a-fA-F:]+\]|[^\s:]+):(\d+)$/.exec(text.trim());
  if (match === null || Number(match[1]) > LARGEST_PORT)
    throw new InvalidArgumentError(`expected HOST:PORT, got "${text}"`);
  return text.trim();
}

/** Comma-separated values, none empty. */
export function list(text: string): string[] {
  const values = text.split(",").map((value) => value.trim());
  if (values.some((value) => value === ""))
    throw new InvalidArgumentError(`expected values parted by commas, got "${text}"`);
  return values;
}

/** Comma-separated values, each as `each` reads it. */
export function listOf<T>(each: (text: string) => T): (text: string) => T[] {
  return (text) => list(text).map(each);
}

/** One of a few words. */
export function oneOf<T extends string>(allowed: readonly T[]): (text: string) => T {
  return (text) => {
    const found = allowed.find((word) => word === text);
    if (found === undefined) throw new InvalidArgumentError(`allowed are ${allowed.join(", ")}, got "${text}"`);
    return found;
  };
}

/** An option whose environment twin is KIVIMESH_ and its long name: `--http-port` is KIVIMESH_HTTP_PORT. */
export function option(flags: string, description: string): Option {
  const made = new Option(flags, description);
  return made.env(`KIVIMESH_${made.name().replaceAll("-", "_").toUpperCase()}`);
}

/**
 * Gives switches (`--once`) their environment's value: for commander any value means "on", "0" too.
 * @throws UsageError naming the variable, where it is neither on nor off.
 */
export function readSwitches(command: Command, environment: NodeJS.ProcessEnv): void {
  for (const each of command.options) {
    const { envVar } = each;
    const name = each.attributeName();
    const takesValue = each.required || each.optional;
    if (envVar === undefined || takesValue || command.getOptionValueSource(name) !== "env") continue;
    const value = environment[envVar] ?? "";
    if (["1", "true"].includes(value)) continue;
    if (!["", "0", "false"].includes(value))
      throw new UsageError(`${envVar}: expected 1, true, 0 or false, got "${value}"`);
    command.setOptionValueWithSource(name, undefined, "default");
  }
}
