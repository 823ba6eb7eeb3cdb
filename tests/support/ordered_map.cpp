/* Drives vmm::OrderedMap and std::map with the same random steps, and stops at the first
   difference. Its nodes hold few entries, and malloc, which the linker wraps, fails now and then.
   Arguments: a seed, and how many steps. */

#include "ordered_map.h"

#include <cstdint>
#include <cstdio>
#include <iterator>
#include <map>
#include <random>

static long allocations_to_come = -1;       /* before one fails; negative: none does */
static long live;                           /* nodes */

extern "C" void *__real_malloc(std::size_t);
extern "C" void __real_free(void *);

extern "C" void *__wrap_malloc(std::size_t size)
{
    if (allocations_to_come == 0)
        return nullptr;
    if (allocations_to_come > 0)
        allocations_to_come--;
    live++;
    return __real_malloc(size);
}

extern "C" void __wrap_free(void *memory)
{
    live -= memory != nullptr;
    __real_free(memory);
}

using Key = std::uint64_t;
using Small = vmm::OrderedMap<Key, Key, 96>;    /* 4 entries a leaf, 5 forks a branch */
using Usual = vmm::OrderedMap<Key, Key>;

static std::mt19937_64 random_bits;

static Key below(Key limit) { return random_bits() % limit; }

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            std::printf("line %d: %s does not hold\n", __LINE__, #condition);              \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (0)

/* A map and what it should be. */
template <class Map>
struct Pair {
    Map map;
    std::map<Key, Key> model;

    void check_same(typename Map::iterator place, std::map<Key, Key>::iterator expected)
    {
        CHECK((place == map.end()) == (expected == model.end()));
        if (expected != model.end())
            CHECK((*place).first == expected->first && (*place).second == expected->second);
    }

    void check_all()
    {
        auto place = map.begin();
        CHECK(map.size() == model.size());
        for (auto expected = model.begin(); expected != model.end(); ++expected, ++place)
            check_same(place, expected);
        CHECK(place == map.end());
        for (auto expected = model.rbegin(); expected != model.rend(); ++expected)
            CHECK((*--place).first == expected->first);
        CHECK(place == map.begin());
    }

    void check_searches(Key key)
    {
        check_same(map.lower_bound(key), model.lower_bound(key));
        check_same(map.upper_bound(key), model.upper_bound(key));
        check_same(map.find(key), model.find(key));
        CHECK(map.count(key) == model.count(key));
    }

    /* An iterator stays good while larger keys come and go. */
    template <class Change>
    void change_above(Key key, Change change)
    {
        const auto lower = model.lower_bound(key);
        if (lower == model.begin())
            return change();
        const Key kept = std::prev(lower)->first;
        auto place = map.find(kept);
        change();
        check_same(place, model.find(kept));
        check_same(++place, std::next(model.find(kept)));
    }

    void insert(Key key)
    {
        const Key value = random_bits();
        const auto next = model.lower_bound(key);
        bool inserted = false;
        if (next != model.end() && next->first == key)
            return;
        allocations_to_come = below(4) == 0 ? static_cast<long>(below(3)) : -1;
        change_above(key, [&] {
            if (next == model.begin() || below(2) == 0) {
                inserted = map.insert(key, value);
            } else {
                auto place = map.find(std::prev(next)->first);
                inserted = map.insert_after(&place, key, value);
                CHECK(!inserted || ((*place).first == key && (*place).second == value));
            }
            if (inserted)
                model.emplace(key, value);
        });
        CHECK(inserted || allocations_to_come == 0);
        allocations_to_come = -1;
        check_searches(key);
    }

    /* Erase some entries in a row. */
    void erase(Key key, Key some)
    {
        auto expected = model.lower_bound(key);
        change_above(key, [&] {
            auto place = map.lower_bound(key);
            for (; some > 0 && expected != model.end(); some--) {
                place = map.erase(place);
                expected = model.erase(expected);
                check_same(place, expected);
            }
        });
        check_searches(key);
    }
};

/* Grow and shrink by turns, from nothing to nothing. */
template <class Map>
static void compare(long steps, Key keys)
{
    Pair<Map> both;
    for (long step = 0; step < steps; step++) {
        const bool growing = step / 2000 % 2 == 0;
        const Key key = below(10) == 0 ? ~Key(0) - below(3) : below(keys);
        if (below(4) < (growing ? 3u : 1u))
            both.insert(key);
        else
            both.erase(key, growing ? 1 : below(12));
        both.check_searches(below(keys));
        if (step % 100 == 0)
            both.check_all();
    }
    both.check_all();
    both.erase(0, ~Key(0));
    both.check_all();
    both.insert(1);
    both.check_all();
}

/* Leaves are full that were filled in order, up or down. */
template <class Map>
static void fill(Key first, Key step, std::size_t entries_in_leaf)
{
    const std::size_t count = 10000;
    Map map;
    for (std::size_t i = 0; i < count; i++)
        CHECK(map.insert(first + i * step, i));
    CHECK(live * entries_in_leaf < count + count / 5);
}

int main(int, char **arguments)
{
    const long steps = std::atol(arguments[2]);
    random_bits.seed(std::strtoull(arguments[1], nullptr, 10));
    compare<Small>(steps, 3000);
    compare<Small>(steps, 40);
    compare<Usual>(steps, 3000);
    CHECK(live == 0);
    fill<Usual>(1, 1, 62);
    fill<Usual>(10000, ~Key(0), 62);
    Small::set_leaf_limit(1);               /* as tests of roll-back have it: each takes memory */
    compare<Small>(steps, 100);
    CHECK(live == 0);
    std::puts("the same");
}
