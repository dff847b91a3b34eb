/** `kivimesh bench`: how fast this machine is. */
import type { Command } from "commander";
import { addEngineBench } from "./bench-engine.ts";
import { addThroughputBench } from "./bench-throughput.ts";
import type { CommandContext } from "./command-context.ts";

export function addBenchCommand(program: Command, context: CommandContext): void {
  const bench = program.command("bench").description("measure this machine");
  addEngineBench(bench, context);
  addThroughputBench(bench, context);
}
