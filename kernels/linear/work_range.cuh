// Who computes what. Plain C++, so that a host compiler can check it against brute force.
//
// The product is cut into output tiles; a tile needs `tiles_k` steps, one for each packed tile along the inputs. With stream-K
// all steps of all tiles form one line, tile after tile, which is cut into ranges, one per CTA: the first `longer` CTAs take
// `run` + 1 steps, the others `run`, whatever the shape. A tile whose steps lie in several ranges is summed from float32
// partial sums.
#pragma once

struct Schedule {
    unsigned run;     // steps / CTAs
    unsigned longer;  // steps % CTAs

    // First step of a CTA's range, which ends where the next CTA's begins.
    WORK_INLINE unsigned first_step(unsigned cta) const { return cta * run + (cta < longer ? cta : longer); }

    // The CTA whose range holds this step: the inverse of `first_step`.
    WORK_INLINE unsigned cta_of(unsigned step) const {
        const unsigned long_steps = longer * (run + 1);
        return step < long_steps ? step / (run + 1) : longer + (step - long_steps) / run;
    }
};

// Steps `begin` to `end` of one output tile, which one CTA computes. What a CTA does is a list of these; how it comes to the
// next one is the matter of `PortableWork` and `HopperWork`. Tokens vary fastest along the line of tiles: CTAs that meet the
// same weights do so at about the same time.
struct WorkRange {
    int begin, end;
    unsigned tile;  // number on the line
    unsigned left;  // what follows of the CTA's share: steps, or whole tiles

    template <class P>
    WORK_INLINE bool whole(const P& p) const {
        return begin == 0 && end == p.tiles_k;
    }

    // As many of the `steps` that are left as this tile has from `begin` on.
    template <class P>
    WORK_INLINE void take(const P& p, unsigned steps) {
        const unsigned length = p.tiles_k - begin < steps ? p.tiles_k - begin : steps;
        end = begin + length;
        left = steps - length;
    }
};
