/** What eviction needs to know of a held block. */
export interface EvictableBlock {
  readonly id: string;
  readonly parentId: string;
  readonly bytes: number;
  /** Grows with each use. */
  readonly lastUsed: number;
  /** Leased or pinned: neither it nor the blocks before it may go. */
  readonly isProtected: boolean;
}

/**
 * Which blocks to remove, in order, to free `bytesToFree`: least recently used chains first, tails before heads, never a
 * protected block nor one that a held protected block follows. Fewer bytes than asked if no more may go. Pure.
 */
export function chooseVictims(blocks: Iterable<EvictableBlock>, bytesToFree: number): string[] {
  const nodes = new Map<string, ChainNode>();
  for (const block of blocks) {
    nodes.set(block.id, { block, children: 0, lastUsed: block.lastUsed, isProtected: block.isProtected });
  }
  for (const { block } of nodes.values()) {
    const parent = nodes.get(block.parentId);
    if (parent !== undefined) {
      parent.children++;
    }
  }
  const order = tailsFirst(nodes).filter((node) => !node.isProtected);
  // Stable: among equally old blocks of a chain the tail stays first.
  order.sort((left, right) => left.lastUsed - right.lastUsed);
  const victims: string[] = [];
  let freed = 0;
  for (const { block } of order) {
    if (freed >= bytesToFree) {
      break;
    }
    victims.push(block.id);
    freed += block.bytes;
  }
  return victims;
}

interface ChainNode {
  readonly block: EvictableBlock;
  /** Held children not visited yet. */
  children: number;
  /** Of the block or of any held block after it: a head is as young as its youngest tail. */
  lastUsed: number;
  isProtected: boolean;
}

/** Every block after all its held successors; what a block inherits from them is filled in on the way. */
function tailsFirst(nodes: ReadonlyMap<string, ChainNode>): ChainNode[] {
  const order = [...nodes.values()].filter((node) => node.children === 0);
  // Grows while it is walked.
  for (const node of order) {
    const parent = nodes.get(node.block.parentId);
    if (parent === undefined) {
      continue;
    }
    parent.lastUsed = Math.max(parent.lastUsed, node.lastUsed);
    parent.isProtected ||= node.isProtected;
    parent.children--;
    if (parent.children === 0) {
      order.push(parent);
    }
  }
  return order;
}
