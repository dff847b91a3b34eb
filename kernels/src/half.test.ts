import { expect, test } from "vitest";
import { floatToHalf, halfToFloat } from "./half.ts";

test("every half survives the round trip, NaN as a NaN", () => {
  for (let bits = 0; bits < 65536; bits++) {
    const value = halfToFloat(bits);
    if (Number.isNaN(value)) expect(Number.isNaN(halfToFloat(floatToHalf(value)))).toBe(true);
    else if (floatToHalf(value) !== bits) throw new Error(`${bits} became ${floatToHalf(value)}`);
  }
});

test("rounds to the nearest half, ties to even", () => {
  for (let bits = 0; bits < 0x7bff; bits++) {
    const low = halfToFloat(bits);
    const high = halfToFloat(bits + 1);
    const middle = (low + high) / 2;
    const even = bits % 2 === 0 ? bits : bits + 1;
    const below = Math.fround(middle - (high - low) / 64);
    const above = Math.fround(middle + (high - low) / 64);
    if (floatToHalf(middle) !== even || floatToHalf(below) !== bits || floatToHalf(above) !== bits + 1) {
      throw new Error(`around ${middle}: ${floatToHalf(below)}, ${floatToHalf(middle)}, ${floatToHalf(above)}`);
    }
  }
});

test("known values", () => {
  expect(floatToHalf(1.9999)).toBe(0x4000);
  expect(floatToHalf(0.49999)).toBe(0x3800);
  expect(floatToHalf(65504)).toBe(0x7bff);
  expect(floatToHalf(65519)).toBe(0x7bff);
  expect(floatToHalf(65520)).toBe(0x7c00);
  expect(floatToHalf(-2)).toBe(0xc000);
  expect(floatToHalf(-0)).toBe(0x8000);
  expect(floatToHalf(2 ** -25)).toBe(0);
  expect(floatToHalf(2 ** -24)).toBe(1);
  expect(floatToHalf(Number.NEGATIVE_INFINITY)).toBe(0xfc00);
});
