/** Where a service listens, and its TLS files. */
import { readFile } from "node:fs/promises";
import { ClusterError, type LogLevel, type TlsFiles } from "@kivimesh/proto";
import type { Command } from "commander";
import { integer, option } from "./option-values.ts";

const LOG_LEVELS: readonly LogLevel[] = ["trace", "debug", "info", "warn", "error", "fatal", "silent"];

export interface ListenerOptions {
  readonly host: string;
  readonly tlsCertificate?: string;
  readonly tlsKey?: string;
  readonly tlsAuthority?: string;
  readonly allowInsecure?: boolean;
  readonly logLevel: LogLevel;
  readonly drainTimeoutMs: number;
}

/** @param defaultLogLevel of this command. @param defaultDrainMs how long running streams may take to finish. */
export function addListenerOptions(
  command: Command,
  defaultLogLevel: ListenerOptions["logLevel"],
  defaultDrainMs: number,
): Command {
  return command
    .addOption(option("--host <host>", "address to listen on; others than loopback need TLS").default("127.0.0.1"))
    .addOption(option("--tls-certificate <file>", "PEM certificate of this service; clients must show one too"))
    .addOption(option("--tls-key <file>", "its PEM key"))
    .addOption(option("--tls-authority <file>", "PEM certificate that all services' certificates are signed by"))
    .addOption(option("--allow-insecure", "listen beyond loopback without TLS, in a network that is closed by itself"))
    .addOption(
      option("--log-level <level>", "of the JSON log on standard error").choices(LOG_LEVELS).default(defaultLogLevel),
    )
    .addOption(
      option("--drain-timeout-ms <ms>", "how long running streams may take to finish at SIGTERM or Ctrl-C")
        .argParser(integer(0))
        .default(defaultDrainMs),
    );
}

/** Reads the TLS files. @throws ClusterError INVALID_ARGUMENT where only some of the three are given or one cannot be read. */
async function tlsFiles(options: ListenerOptions): Promise<TlsFiles | undefined> {
  const paths = [options.tlsCertificate, options.tlsKey, options.tlsAuthority];
  if (paths.every((path) => path === undefined)) return undefined;
  const read = async (path: string | undefined): Promise<Buffer> => {
    if (path === undefined) {
      throw new ClusterError("INVALID_ARGUMENT", "--tls-certificate, --tls-key and --tls-authority go together");
    }
    try {
      return await readFile(path);
    } catch (error) {
      throw new ClusterError("INVALID_ARGUMENT", `cannot read ${path}: ${(error as Error).message}`, { cause: error });
    }
  };
  const [certificate, key, authority] = await Promise.all([read(paths[0]), read(paths[1]), read(paths[2])]);
  return { certificate, key, authority };
}

/** What services take of these options. */
export async function listenerConfig(
  options: ListenerOptions,
): Promise<{ host: string; logLevel: LogLevel; allowInsecure: boolean; tls?: TlsFiles }> {
  const tls = await tlsFiles(options);
  const { host, logLevel } = options;
  return { host, logLevel, allowInsecure: options.allowInsecure ?? false, ...(tls === undefined ? {} : { tls }) };
}
