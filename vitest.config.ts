import { defineConfig } from "vitest/config";

export default defineConfig({
  // Packages resolve each other from TypeScript source, so tests need no build.
  resolve: { conditions: ["source"] },
  ssr: { resolve: { conditions: ["source", "node", "import", "default"] } },
  test: {
    include: ["*/src/**/*.test.ts", "kernels/bench/**/*.test.ts"],
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // The software Vulkan driver uses every core by itself: files that run side by side only slow each other.
    fileParallelism: false,
    pool: "forks",
    reporters: ["default", "./scripts/count-reporter.mjs"],
  },
});
