import { describe, expect, it } from "vitest";
import { parseLinuxRelease, usesApt } from "./linux-release.ts";
import { driverPackages, isOldLavapipe } from "./vulkan-driver.ts";

const BOOKWORM = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\nID=debian\n';
const NOBLE = 'ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME="noble"\n';

describe("the Vulkan driver's packages", () => {
  it("come from backports on Debian 12 only", () => {
    expect(driverPackages(parseLinuxRelease(BOOKWORM)).suite).toBe("bookworm-backports");
    expect(driverPackages(parseLinuxRelease(NOBLE)).suite).toBeUndefined();
  });

  it("are apt's on Debian and its kin", () => {
    expect(usesApt(parseLinuxRelease(NOBLE))).toBe(true);
    expect(usesApt(parseLinuxRelease("ID='linuxmint'\nID_LIKE=\"ubuntu debian\"\n"))).toBe(true);
    expect(usesApt(parseLinuxRelease("ID=fedora\n"))).toBe(false);
    expect(usesApt(undefined)).toBe(false);
  });

  it("are asked for where lavapipe is older than Mesa 24", () => {
    const gpu = (name: string) => ({ name, profile: "software" as const });
    expect(isOldLavapipe(gpu("llvmpipe: Mesa 22.3.6 (LLVM 15.0.6) 0.0.1"))).toBe(true);
    expect(isOldLavapipe(gpu("llvmpipe: Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6) 0.0.1"))).toBe(false);
    expect(isOldLavapipe(gpu("NVIDIA H100"))).toBe(false);
  });
});
