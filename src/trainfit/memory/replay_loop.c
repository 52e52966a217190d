/* A trace through torch's caching allocator at one capacity: what python_loop.py does, in C.

Sizes and addresses are counted in blocks of 512 bytes. Blocks of a segment are a doubly linked list; free blocks of a pool are
an array, sorted by size and start, from which the first that is long enough is taken. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t start, end;
    int64_t before, after; /* neighbours in the segment; -1: none */
    int is_free;
} Block;

typedef struct {
    int64_t size, start, block;
} Free;

typedef struct {
    Free *items;
    int64_t count, room;
} Pool;

typedef struct {
    Block *blocks;
    int64_t count, room;
    int64_t unused; /* first of the blocks that can be used again, linked by `after`; -1: none */
    Pool *pools;
    int64_t pool_count;
    int64_t reserved, next_segment, accepted, rejected;
    int64_t *exchanges, exchange_count;
    int out_of_host_memory, is_invalid;
} State;

/* What a replay ends in; the same fields as `Ended` in python_loop.py. */
typedef struct {
    int64_t survives, accepted, rejected, has_missed, reserved, retries, exchange_count;
} Ended;

/* Room for one more item; 0 where the host has no memory. */
static int grow(void **items, int64_t count, int64_t *room, size_t bytes) {
    if (count < *room) return 1;
    int64_t wanted = *room ? 2 * *room : 256;
    void *larger = realloc(*items, (size_t)wanted * bytes);
    if (larger == NULL) return 0;
    *items = larger;
    *room = wanted;
    return 1;
}

static int64_t new_block(State *state, int64_t start, int64_t end, int64_t before, int64_t after) {
    int64_t number = state->unused;
    if (number >= 0) {
        state->unused = state->blocks[number].after;
    } else {
        if (!grow((void **)&state->blocks, state->count, &state->room, sizeof(Block))) {
            state->out_of_host_memory = 1;
            return 0;
        }
        number = state->count++;
    }
    state->blocks[number] = (Block){.start = start, .end = end, .before = before, .after = after, .is_free = 0};
    return number;
}

static void drop_block(State *state, int64_t number) {
    state->blocks[number].after = state->unused;
    state->unused = number;
}

/* Index of the first free block that is not before one of this size and start. */
static int64_t place(const Pool *pool, int64_t size, int64_t start) {
    int64_t low = 0, high = pool->count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        const Free *each = &pool->items[middle];
        if (each->size < size || (each->size == size && each->start < start))
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void insert_free(State *state, Pool *pool, int64_t number) {
    Block *block = &state->blocks[number];
    Free item = {.size = block->end - block->start, .start = block->start, .block = number};
    if (!grow((void **)&pool->items, pool->count, &pool->room, sizeof(Free))) {
        state->out_of_host_memory = 1;
        return;
    }
    int64_t at = place(pool, item.size, item.start);
    memmove(pool->items + at + 1, pool->items + at, (size_t)(pool->count - at) * sizeof(Free));
    pool->items[at] = item;
    pool->count++;
    block->is_free = 1;
}

static void remove_free(Pool *pool, int64_t at) {
    pool->count--;
    memmove(pool->items + at, pool->items + at + 1, (size_t)(pool->count - at) * sizeof(Free));
}

static int is_free(const State *state, int64_t number) { return number >= 0 && state->blocks[number].is_free; }

/* Take a free block out of its pool; what it was. */
static Block take(State *state, Pool *pool, int64_t number) {
    Block block = state->blocks[number];
    remove_free(pool, place(pool, block.end - block.start, block.start));
    drop_block(state, number);
    return block;
}

/* Free a block: it is joined with free neighbours. */
static void release(State *state, Pool *pool, int64_t number) {
    Block *block = &state->blocks[number];
    if (is_free(state, block->after)) {
        Block next = take(state, pool, block->after);
        block->end = next.end;
        block->after = next.after;
        if (next.after >= 0) state->blocks[next.after].before = number;
    }
    if (is_free(state, block->before)) {
        Block previous = take(state, pool, block->before);
        block->start = previous.start;
        block->before = previous.before;
        if (previous.before >= 0) state->blocks[previous.before].after = number;
    }
    insert_free(state, pool, number);
}

/* Give every segment that is free as a whole back to the driver. */
static void empty_cache(State *state) {
    for (int64_t each = 0; each < state->pool_count; each++) {
        Pool *pool = &state->pools[each];
        int64_t kept = 0;
        for (int64_t at = 0; at < pool->count; at++) {
            Free item = pool->items[at];
            Block *block = &state->blocks[item.block];
            if (block->before < 0 && block->after < 0) {
                state->reserved -= item.size;
                drop_block(state, item.block);
            } else {
                pool->items[kept++] = item;
            }
        }
        pool->count = kept;
    }
}

static int exceeds(State *state, int64_t limit, int64_t length) {
    int64_t wanted = state->reserved + length;
    if (wanted <= limit) return 0;
    if (wanted < state->rejected) state->rejected = wanted;
    return 1;
}

static void note_exchange(State *state, int64_t index) {
    if (state->exchanges != NULL) {
        state->exchanges[2 * state->exchange_count] = index;
        state->exchanges[2 * state->exchange_count + 1] = state->reserved;
    }
    state->exchange_count++;
}

/* The block of a new segment; -1 where the capacity is too small even after the cache was emptied. */
static int64_t new_segment(State *state, Ended *ended, int64_t index, int64_t length, int64_t limit) {
    if (exceeds(state, limit, length)) {
        empty_cache(state);
        note_exchange(state, index);
        ended->retries++;
        if (exceeds(state, limit, length)) return -1;
    }
    int64_t start = state->next_segment;
    state->next_segment += length + 1;
    state->reserved += length;
    if (state->reserved > state->accepted) state->accepted = state->reserved;
    note_exchange(state, index);
    return new_block(state, start, start + length, -1, -1);
}

/* Cut a block after `size`; the rest is free. */
static void cut(State *state, Pool *pool, int64_t number, int64_t size) {
    int64_t middle = state->blocks[number].start + size, after = state->blocks[number].after;
    int64_t rest = new_block(state, middle, state->blocks[number].end, number, after);
    if (state->out_of_host_memory) return;
    if (after >= 0) state->blocks[after].before = rest;
    state->blocks[number].end = middle;
    state->blocks[number].after = rest;
    insert_free(state, pool, rest);
}

/* Replay all events; 0 where memory runs out. `small`: the longest request of a small segment, of `segment` blocks; `large`: the
segment of requests below `shared`; those above have segments of their own, rounded up to `segment`. */
static int run(State *state, Ended *ended, const int64_t *ops, int64_t op_count, int64_t count, const int64_t *sizes,
               const int64_t *pools, int64_t *of, int64_t *lengths, int64_t limit, const int64_t *kinds) {
    int64_t small = kinds[0], segment = kinds[1], large = kinds[2], shared = kinds[3];
    for (int64_t index = 0; index < op_count && !state->out_of_host_memory; index++) {
        int64_t op = ops[index];
        if (op < 0) {
            if (of[~op] < 0) {
                state->is_invalid = 1;
                return 0;
            }
            release(state, &state->pools[pools[~op]], of[~op]);
            of[~op] = -1;
            continue;
        }
        int64_t tensor = op < count ? op : op - count;
        int64_t size = sizes[tensor];
        Pool *pool = &state->pools[pools[tensor]];
        int64_t at = place(pool, size, 0), number;
        if (at < pool->count) {
            if (op >= count) continue;
            number = pool->items[at].block;
            remove_free(pool, at);
            state->blocks[number].is_free = 0;
        } else if (op >= 2 * count) {
            ended->has_missed = 1;
            continue;
        } else {
            int64_t length = size <= small ? segment : size < shared ? large : (size + segment - 1) / segment * segment;
            number = new_segment(state, ended, index, length, limit);
            if (number < 0) return 0;
            if (state->out_of_host_memory) break;
        }
        if (op >= count) {
            release(state, pool, number);
            continue;
        }
        Block *block = &state->blocks[number];
        if (block->end - block->start - size > (size <= small ? 0 : small)) cut(state, pool, number, size);
        of[tensor] = number;
        if (lengths != NULL) lengths[tensor] = state->blocks[number].end - state->blocks[number].start;
    }
    return 1;
}

/* Entry point. `lengths` (of each tensor's block) and `exchanges` (two numbers each) may be NULL. Returns 1, or 0 where the host has
no memory, or -1 where a tensor is freed that is not allocated. */
int trainfit_replay(const int64_t *ops, int64_t op_count, int64_t count, const int64_t *sizes, const int64_t *pools,
                    int64_t pool_count, int64_t limit, const int64_t *kinds, int64_t has_missed, int64_t *lengths,
                    int64_t *exchanges, Ended *ended) {
    State state = {.unused = -1, .pool_count = pool_count, .next_segment = kinds[1], .rejected = INT64_MAX};
    int64_t *of = malloc(((size_t)count + 1) * sizeof(int64_t));
    for (int64_t tensor = 0; of != NULL && tensor < count; tensor++) of[tensor] = -1;
    state.pools = calloc((size_t)pool_count + 1, sizeof(Pool));
    state.exchanges = exchanges;
    *ended = (Ended){.has_missed = has_missed};
    if (of == NULL || state.pools == NULL)
        state.out_of_host_memory = 1;
    else
        ended->survives = run(&state, ended, ops, op_count, count, sizes, pools, of, lengths, limit, kinds);
    ended->accepted = state.accepted;
    ended->rejected = state.rejected;
    ended->reserved = state.reserved;
    ended->exchange_count = state.exchange_count;
    for (int64_t each = 0; state.pools != NULL && each < pool_count; each++) free(state.pools[each].items);
    free(state.pools);
    free(state.blocks);
    free(of);
    if (state.is_invalid) return -1;
    return !state.out_of_host_memory;
}
