import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { address, bytes, decimal, integer, list, option, port } from "./option-values.ts";

describe("option values", () => {
  it("reads whole numbers in range and nothing else", () => {
    fc.assert(fc.property(fc.integer({ min: 3, max: 99 }), (value) => integer(3, 99)(String(value)) === value));
    for (const wrong of ["2", "100", "", "-4", "5.5", "0x10", "1e1", "four"]) {
      expect(() => integer(3, 99)(wrong), wrong).toThrow(/from 3 to 99/);
    }
    expect(port("0")).toBe(0);
    expect(() => port("65536")).toThrow();
  });

  it("reads bytes with binary units", () => {
    expect([bytes("1048576"), bytes("512MiB"), bytes("2G"), bytes("1.5 KiB"), bytes("3kb")]).toEqual([
      1048576,
      512 * 2 ** 20,
      2 ** 31,
      1536,
      3072,
    ]);
    for (const wrong of ["", "0", "MiB", "-1", "5 apples", "1XB"]) expect(() => bytes(wrong), wrong).toThrow(/512MiB/);
  });

  it("reads numbers, addresses and lists", () => {
    expect(decimal(0, 2)("0.7")).toBe(0.7);
    for (const wrong of ["", "3", "NaN", "-0.1"]) expect(() => decimal(0, 2)(wrong), wrong).toThrow(/from 0 to 2/);
    expect(address("[::1]:50051")).toBe("[::1]:50051");
    for (const wrong of ["localhost", "::1:5", "host:", "host:99999", "a b:1"])
      expect(() => address(wrong), wrong).toThrow();
    expect(list("f16, kivi2r")).toEqual(["f16", "kivi2r"]);
    expect(() => list("f16,,kivi4")).toThrow();
  });

  it("names the environment twin after the flag", () => {
    expect(option("--http-port <port>", "").envVar).toBe("KIVIMESH_HTTP_PORT");
  });
});
