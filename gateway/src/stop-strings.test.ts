import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { StopStrings } from "./stop-strings.ts";

function run(parts: readonly string[], stops: readonly string[]): { text: string; stopped: boolean } {
  const filter = new StopStrings(stops);
  const text = parts.map((part) => filter.push(part)).join("") + filter.finish();
  return { text, stopped: filter.stopped };
}

/** By definition: the first character at which any stop string is complete; the longest that ends there. */
function definition(text: string, stops: readonly string[]): { text: string; stopped: boolean } {
  for (let end = 1; end <= text.length; end++) {
    const lengths = stops.filter((stop) => text.slice(0, end).endsWith(stop)).map((stop) => stop.length);
    if (lengths.length > 0) return { text: text.slice(0, end - Math.max(...lengths)), stopped: true };
  }
  return { text, stopped: false };
}

describe("StopStrings", () => {
  it("equals its definition however the text is split", () => {
    const letters = fc.constantFrom("a", "b", "c");
    const parts = fc.array(fc.string({ unit: letters, maxLength: 4 }), { maxLength: 8 });
    const stops = fc.array(fc.string({ unit: letters, minLength: 1, maxLength: 4 }), { maxLength: 4 });
    fc.assert(
      fc.property(parts, stops, (split, strings) => {
        expect(run(split, strings)).toEqual(definition(split.join(""), strings));
      }),
      { numRuns: 5000 },
    );
  });

  it("holds back only what may begin a stop string", () => {
    const filter = new StopStrings(["END"]);
    expect(filter.push("the E")).toBe("the ");
    expect(filter.push("N")).toBe("");
    expect(filter.push("TER")).toBe("ENTER");
    expect(filter.push("EEN")).toBe("E");
    expect(filter.push("D tail")).toBe("");
    expect(filter.stopped).toBe(true);
    expect(filter.push("more") + filter.finish()).toBe("");
  });

  it("gives back what was held when the text ends", () => {
    expect(run(["almost EN"], ["END"])).toEqual({ text: "almost EN", stopped: false });
  });
});
