/** Vitest reporter: the last line of a run is `N passed, N failed`. */
import { writeSync } from "node:fs";

export default class CountReporter {
  /**
   * @param {readonly import("vitest/node").TestModule[]} modules
   * @param {readonly unknown[]} unhandledErrors
   */
  onTestRunEnd(modules, unhandledErrors) {
    let passed = 0;
    let failed = unhandledErrors.length;
    for (const module of modules) {
      for (const test of module.children.allTests()) {
        const { state } = test.result();
        if (state === "passed") passed += 1;
        else if (state !== "skipped") failed += 1;
      }
      // A file that does not load, or a hook that fails, holds no failed test.
      failed += module.errors().length;
      for (const suite of module.children.allSuites()) failed += suite.errors().length;
    }
    // The other reporters print after this; the line has to be the last.
    process.once("exit", () => writeSync(1, `${passed} passed, ${failed} failed\n`));
  }
}
