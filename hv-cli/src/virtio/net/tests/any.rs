//! Random drivers.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Buffers and frames of any lengths, in any order, by datagram or stream: what fits arrives whole and
    /// in order, what does not is counted.
    #[test]
    fn what_arrives_is_what_was_sent(
        mergeable: bool,
        by_stream: bool,
        steps in prop::collection::vec(
            prop_oneof![
                (12u32..400).prop_map(|len| (true, len)),
                (1u32..900).prop_map(|len| (false, len)),
            ],
            1..80,
        ),
    ) {
        let (features, ((datagram, to_datagram), (stream, mut to_stream))) =
            (if mergeable { MRG } else { 0 }, (frames(), stream()));
        let port = if by_stream { stream } else { datagram };
        let mut rig = Rig::new(vec![port], features);
        let (mut sent, mut got, mut buffers, mut at) = (Vec::new(), Vec::new(), BTreeMap::new(), BUFFERS);
        let mut outstanding = 0;
        for (n, &(is_buffer, len)) in steps.iter().enumerate() {
            if is_buffer && outstanding < SIZE {
                let head = rig.offer(RX, &[(at, len, WRITE)]);
                buffers.insert(head, at);
                at += u64::from(len);
                outstanding += 1;
                rig.ring(RX);
            } else if !is_buffer {
                let frame = frame(n, len as usize);
                if by_stream {
                    to_stream.write_all(&in_stream(&frame)).unwrap();
                } else if to_datagram.send(&frame).is_err() {
                    continue;
                }
                sent.push(frame);
            }
            rig.poll();
            let mut rest = rig.completed(RX).into_iter();
            while let Some((head, len)) = rest.next() {
                let first = rig.bytes(buffers[&head], len as usize);
                let count = u16::from_le_bytes([first[10], first[11]]);
                let mut whole = first[12..].to_vec();
                for (head, len) in rest.by_ref().take(usize::from(count) - 1) {
                    whole.extend(rig.bytes(buffers[&head], len as usize));
                }
                outstanding -= count;
                got.push(whole);
            }
        }
        let errors = rig.values().errors as usize;
        if mergeable {
            prop_assert!(errors == 0 || steps.iter().filter(|(buffer, _)| *buffer).count() >= SIZE.into());
        }
        // In order, and what is missing was dropped or still waits.
        let mut all = sent.iter();
        for frame in &got {
            prop_assert!(all.any(|sent| sent == frame));
        }
        prop_assert!(got.len() + errors <= sent.len());
    }
}
