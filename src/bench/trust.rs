//! Whether the figures can be relied on: how many rounds there are, how far they lie apart, and parts of limits that cannot be.

use crate::bench::{
    report::{Hop, Load},
    stats::interval,
    verdict::measured,
};

/// Fewer rounds do not tell a rate from noise.
const ENOUGH_ROUNDS: usize = 5;
/// How wide the interval of a median may be, as a part of the median.
const WIDEST: f64 = 0.5;

/// Why no verdict can be given, in words; nothing if it can. `loads` are the hops that a verdict is made of.
pub(super) fn doubts(hops: &[Hop], loads: [&[Load]; 2]) -> Vec<String> {
    let mut out = Vec::new();
    let rounds = || hops.iter().filter_map(|hop| hop.figure.as_ref()).map(|figure| figure.rates.len());
    let Some((least, most)) = rounds().min().zip(rounds().max()) else {
        return vec!["no hop had time for a round".to_owned()];
    };
    if least < ENOUGH_ROUNDS {
        let only = if least == 1 { "only 1 round".to_owned() } else { format!("only {least} rounds") };
        let who = if least == most { "each hop" } else { "some hops" };
        out.push(format!("{who} had {only}, and it takes {ENOUGH_ROUNDS} to tell a rate from noise"));
    }
    let mut names: Vec<&str> = loads.into_iter().flatten().map(|load| load.hop.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    for hop in names.into_iter().filter_map(|name| measured(hops, name)) {
        if let Some((low, high)) = interval(&hop.rates(1.0))
            && high - low > WIDEST * hop.rate()
        {
            let (name, low, high) = (&hop.name, low / 1e9, high / 1e9);
            out.push(format!(
                "the rounds of {name} lie far apart: its median is anywhere from {low:.2} to {high:.2} GB/s"
            ));
        }
    }
    for hop in hops {
        if let Some(limit) = hop.limit.as_ref().filter(|limit| limit.is_exceeded()) {
            let (name, by, times) = (&hop.name, &limit.by, limit.fraction);
            out.push(format!("{name} ran {times:.1} times as fast as {by} allows, so {by} was measured too low"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        report::{Limit, doubted},
        verdict::tests::hop,
    };

    fn steady(name: &str, rates: &[f64]) -> Hop {
        let mut hop = hop(name, rates[rates.len() / 2]);
        hop.figure.iter_mut().for_each(|figure| figure.rates = rates.to_vec());
        hop
    }

    fn doubts_of(hops: &[Hop], deciding: &str) -> Vec<String> {
        let load = Load { hop: deciding.to_owned(), bytes: 20, params_per_second: 1.0 };
        let loads = std::slice::from_ref(&load);
        doubts(hops, [loads, loads])
    }

    #[test]
    fn steady_rounds_leave_no_doubt() {
        let hops = [steady("nvme_read_write", &[2.0, 9.0, 10.0, 10.1, 10.2, 10.3, 11.0, 12.0, 40.0])];
        assert_eq!(doubts_of(&hops, "nvme_read_write"), [""; 0], "the extremes of nine do not count");
    }

    #[test]
    fn few_rounds_and_rounds_far_apart_do() {
        let hops = [steady("nvme_read_write", &[1e9, 3e9])];
        let said = doubts_of(&hops, "nvme_read_write");
        assert!(said[0].contains("only 2 rounds") && said[1].contains("from 1.00 to 3.00 GB/s"), "{said:?}");
        assert_eq!(said.len(), 2, "each hop once: {said:?}");
        // Those of a hop that decides nothing.
        assert_eq!(doubts_of(&hops, "adamw_cpu").len(), 1);
    }

    #[test]
    fn hops_with_few_rounds_are_told_from_all_hops() {
        let said = |hops: &[Hop]| doubts_of(hops, "adamw_cpu").swap_remove(0);
        let [one, two] = [steady("nvme_read", &[1e9]), steady("nvme_write", &[1e9, 1e9])];
        assert!(said(std::slice::from_ref(&one)).starts_with("each hop had only 1 round,"));
        assert!(said(&[one.clone(), two]).starts_with("some hops had only 1 round,"));
        assert!(doubted(std::slice::from_ref(&one)).starts_with("These figures"));
        let none = Hop { figure: None, ..one };
        assert_eq!(doubted(std::slice::from_ref(&none)), "Nothing was measured:");
        assert_eq!(doubts_of(&[none], "nvme_read"), ["no hop had time for a round"]);
    }

    #[test]
    fn more_than_the_limit_is_a_limit_that_was_mis_measured() {
        let with = |by: &str, fraction| {
            let mut hop = steady("train_traffic", &[1e9; 9]);
            hop.limit = Some(Limit { by: by.to_owned(), bytes_per_second: 1e9 / fraction, fraction });
            doubts_of(&[hop], "nvme_read_write")
        };
        assert_eq!(with("nvme_read_write", 1.1), [""; 0]);
        assert_eq!(with("fio", 3.9), [""; 0], "another program is no limit");
        let said = with("nvme_read_write", 3.9);
        assert!(said[0].starts_with("train_traffic ran 3.9 times as fast as nvme_read_write allows"), "{said:?}");
    }
}
