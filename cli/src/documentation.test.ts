/** The reference pages say what the code does: compared, not trusted. */
import { readdirSync, readFileSync } from "node:fs";
import { errorCatalogue } from "@kivimesh/proto";
import type { Command, Option } from "commander";
import { describe, expect, it } from "vitest";
import { commandLine } from "./main.ts";

/** Names of gRPC's status codes, by number (grpc/doc/statuscodes.md). */
const GRPC_STATUS = [
  "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED",
].flatMap((names) => names.split(" "));

function page(name: string): string {
  return readFileSync(new URL(`../../docs/${name}`, import.meta.url), "utf8");
}

/** Rows of the page's tables, without heads. */
function rows(text: string): string[] {
  return text.split("\n").filter((line) => line.startsWith("| `"));
}

/** Every command that does something, with its full name. */
function leaves(command: Command, name = ""): { name: string; command: Command }[] {
  return command.commands.flatMap((child) => {
    const full = `${name}${child.name()}`;
    return child.commands.length > 0 ? leaves(child, `${full} `) : [{ name: full, command: child }];
  });
}

function optionRow(option: Option): string {
  const twin = option.envVar === undefined ? "" : `\`${option.envVar}\``;
  const value =
    option.defaultValueDescription ?? (option.defaultValue === undefined ? "" : String(option.defaultValue));
  const choices = option.argChoices === undefined ? "" : ` (${option.argChoices.join(", ")})`;
  return `| \`${option.flags}\` | ${twin} | ${value} | ${option.description}${choices} |`;
}

describe("the reference pages", () => {
  const program = commandLine({ output: { write() {}, line() {}, json() {}, notice() {} }, exitWith() {} });

  it("docs/errors.md lists every code of the catalogue with its statuses, and no other", () => {
    const expected = Object.entries(errorCatalogue).map(
      ([code, kind]) => `| \`${code}\` | ${GRPC_STATUS[kind.grpcStatus]} | ${kind.httpStatus} | ${kind.description} |`,
    );
    expect(rows(page("errors.md"))).toEqual(expected);
  });

  it("docs/configuration.md lists every option of every command", () => {
    const text = page("configuration.md");
    for (const { name, command } of leaves(program)) {
      const section = text.split(`\n## kivimesh ${name}\n`)[1]?.split("\n## ")[0] ?? "";
      expect(rows(section), `options of kivimesh ${name}`).toEqual(command.options.map(optionRow));
    }
  });

  it("every option of every command has an environment twin, no two of one command the same", () => {
    for (const { name, command } of leaves(program)) {
      const twins = command.options.map((option) => option.envVar);
      expect(twins, name).not.toContain(undefined);
      expect(new Set(twins).size, name).toBe(twins.length);
    }
  });

  it("docs/cli.md tells of every command", () => {
    const text = page("cli.md");
    for (const { name } of leaves(program)) expect(text).toContain(`\n## kivimesh ${name}\n`);
  });

  it("docs/architecture.md names files that exist", () => {
    const names = [...page("architecture.md").matchAll(/`((?:[\w-]+\/)*[\w-]+\.ts)`/g)].map((match) => match[1] ?? "");
    const root = new URL("../../", import.meta.url);
    const sources = ["proto", "kernels", "worker", "cachestore", "gateway", "cli"].flatMap((name) =>
      readdirSync(new URL(`${name}/src`, root), { recursive: true, encoding: "utf8" }).map(
        (file) => `${name}/src/${file}`,
      ),
    );
    expect(names.length).toBeGreaterThan(20);
    const unknown = names.filter((name) => !sources.some((file) => file === name || file.endsWith(`/${name}`)));
    expect(unknown).toEqual([]);
  });
});
