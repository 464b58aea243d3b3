// Who computes what. Plain C++, so that a host compiler can check it against brute force.
//
// The product is cut into output tiles; a tile needs `groups` steps of 128 inputs. All steps of all tiles form one line,
// tile after tile, which is cut into runs, one per block ("stream-K"): the first `longer` blocks take `run` + 1 steps, the
// others `run`, whatever the shape. A tile whose steps lie in several runs is summed from float32 partial sums.
#pragma once

struct Schedule {
    unsigned run;     // steps / blocks
    unsigned longer;  // steps % blocks

    // First step of a block's run; the run ends where the next block's begins.
    SCHEDULE_INLINE unsigned first_step(unsigned block) const { return block * run + (block < longer ? block : longer); }

    // The block whose run holds this step: the inverse of `first_step`.
    SCHEDULE_INLINE unsigned block_of(unsigned step) const {
        const unsigned long_steps = longer * (run + 1);
        return step < long_steps ? step / (run + 1) : longer + (step - long_steps) / run;
    }
};
