import { describe, expect, it } from "vitest";
import { formatBytes, formatTable } from "./output.ts";

describe("output", () => {
  it("aligns text left and numbers right", () => {
    expect(
      formatTable(
        ["format", "bits"],
        [
          ["f16", 16],
          ["kivi2r", 3.1],
        ],
      ),
    ).toBe("format  bits\nf16       16\nkivi2r   3.1");
    expect(formatTable(["only"], [])).toBe("only");
  });

  it("writes bytes with binary units", () => {
    expect([0, 1023, 1536, 98_362_432].map(formatBytes)).toEqual(["0 B", "1023 B", "1.5 KiB", "93.8 MiB"]);
  });
});
